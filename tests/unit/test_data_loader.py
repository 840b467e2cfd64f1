"""The loader: one global order whatever the world, exact resumption, workers that disturb nothing."""

from __future__ import annotations

import gc
import multiprocessing
import subprocess
import sys
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.data import Loader, Shares, evaluation_batches
from harness.errors import ConfigError, DataError
from tests.support.runs import wait_for


class Numbers:
    """Sample i is the number i."""

    def __init__(self, count: int = 23) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"id": torch.tensor(index)}


class Noisy(Numbers):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"id": torch.tensor(index), "noise": torch.rand(())}


class Broken(Numbers):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        raise DataError(f"sample {index} is damaged")


def ids(batches: list[dict[str, Tensor]], name: str = "id") -> list[Any]:
    return [value for batch in batches for value in batch[name].tolist()]


def run(steps: int, *, dataset: Any = None, name: str = "id", **kwargs: Any) -> list[list[Any]]:
    loader = Loader(dataset or Numbers(), **{"global_batch": 8, "seed": 1} | kwargs)
    try:
        return [ids(loader.next(), name) for _ in range(steps)]
    finally:
        loader.close()


REFERENCE = run(9)
"""72 samples of 23: three epochs and a bit."""


def test_each_epoch_has_each_sample_once_and_batches_cross_its_end() -> None:
    flat = [sample for step in REFERENCE for sample in step]
    first, second = flat[:23], flat[23:46]
    assert sorted(first) == sorted(second) == list(range(23))
    assert first != second


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 1), (1, 4), (2, 2), (4, 1), (4, None), (8, 1)])
def test_the_global_batch_is_the_same_at_every_world_and_micro_batch_size(
    world_size: int, micro_batch: int | None
) -> None:
    ranks = [run(9, rank=rank, world_size=world_size, micro_batch=micro_batch) for rank in range(world_size)]
    assert [list(chain(*shares)) for shares in zip(*ranks, strict=True)] == REFERENCE


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_samples_of_a_micro_batch_can_be_told_afterwards(num_workers: int) -> None:
    settings: dict[str, Any] = {"global_batch": 8, "micro_batch": 2, "world_size": 2, "seed": 1}
    ranks = [Loader(Numbers(), rank=rank, num_workers=num_workers, **settings) for rank in range(2)]
    for turn in range(9):  # three epochs, with a stretch that is skipped as by a rollback
        position = ranks[0].position
        seen = [ids([batch]) for loader in ranks for batch in loader.next()]
        told = [ranks[0].step_indices(position, rank, micro) for rank in range(2) for micro in range(2)]
        assert told == seen
        assert ranks[1].step_indices(position) == list(chain(*seen))
        if turn == 4:
            for loader in ranks:
                loader.skip(13)
    for loader in ranks:
        loader.close()


@pytest.mark.parametrize("world_size", range(1, 13))
@pytest.mark.parametrize("at_most", [None, 1, 2, 3, 4, 12])
def test_a_global_batch_is_shared_by_any_number_of_ranks(world_size: int, at_most: int | None) -> None:
    shares = Shares.of(12, world_size, at_most=at_most)
    size = shares.micro_batch
    held = [range(at, at + size) for rank in range(world_size) for at in shares.offsets(rank)]
    assert [position for part in held for position in part] == list(range(12))
    assert size <= (at_most or 12)
    counts = [len(shares.offsets(rank)) for rank in range(world_size)]
    assert min(counts) >= 1
    assert max(counts) == shares.num_passes <= min(counts) + 1
    if 12 % world_size == 0:
        assert shares.blank_frac == 0
        assert size == min(at_most or 12, 12 // world_size) or (12 // world_size) % (at_most or 1)


@pytest.mark.parametrize(
    ("global_batch", "at_most", "world_size", "size"),
    [(1024, 16, 7, 16), (1024, None, 7, 32), (1024, 16, 8, 16), (12, 12, 5, 1), (512, 32, 3, 16)],
)
def test_passes_are_few_where_the_ranks_are_about_as_busy(
    global_batch: int, at_most: int | None, world_size: int, size: int
) -> None:
    shares = Shares.of(global_batch, world_size, at_most=at_most)
    assert shares.micro_batch == size
    assert shares.samples_per_rank <= 1.12 * -(-global_batch // world_size) or size == 1


class Collected(Numbers):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"id": torch.tensor(gc.isenabled())}


def test_workers_collect_their_garbage_whatever_the_trainer_does() -> None:
    loader = Loader(Collected(), global_batch=8, num_workers=1)
    gc.disable()
    try:
        assert loader.next()[0]["id"].all()
    finally:
        gc.enable()
        loader.close()


def test_micro_batches_have_the_size_asked_for() -> None:
    loader = Loader(Numbers(), global_batch=8, micro_batch=2, rank=1, world_size=2)
    assert [len(batch["id"]) for batch in loader.next()] == [2, 2]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("steps_before", [0, 1, 3, 8])
def test_it_resumes_with_the_next_sample_that_was_not_consumed(num_workers: int, steps_before: int) -> None:
    before = Loader(Numbers(), global_batch=8, seed=1, num_workers=num_workers)
    for _ in range(steps_before):
        before.next()
    state = before.state_dict()
    before.close()

    after = Loader(Numbers(), global_batch=8, seed=1, num_workers=num_workers)
    after.load_state_dict(state)
    assert ids(after.next()) == REFERENCE[steps_before]
    after.close()


@pytest.mark.parametrize("world_size", [1, 3, 4, 5, 7, 8])
def test_it_resumes_in_the_same_global_order_at_another_world_size(world_size: int) -> None:
    state = {"position": 16, "num_samples": 23, "seed": 1}
    shares = []
    for rank in range(world_size):
        loader = Loader(Numbers(), global_batch=8, seed=1, rank=rank, world_size=world_size)
        loader.load_state_dict(state)
        shares += ids(loader.next())
    assert shares == REFERENCE[2]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_going_back_and_skipping_drop_what_was_prefetched(num_workers: int) -> None:
    loader = Loader(Numbers(), global_batch=8, seed=1, num_workers=num_workers)
    loader.next()
    state = loader.state_dict()
    loader.next()
    loader.load_state_dict(state)
    assert ids(loader.next()) == REFERENCE[1]
    loader.skip(16)
    assert (ids(loader.next()), loader.position, loader.epoch) == (REFERENCE[4], 40, 1)
    loader.close()


@pytest.mark.parametrize(("key", "value"), [("num_samples", 24), ("seed", 2)])
def test_a_state_of_other_data_or_another_seed_is_refused(key: str, value: int) -> None:
    loader = Loader(Numbers(), global_batch=8, seed=1)
    with pytest.raises(DataError, match=f"{key} = {value}"):
        loader.load_state_dict(loader.state_dict() | {key: value})


def test_workers_bring_the_same_batches_as_none() -> None:
    assert run(9, num_workers=2, micro_batch=2) == REFERENCE


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_global_generator_is_left_alone(num_workers: int) -> None:
    before = torch.get_rng_state()
    run(2, dataset=Noisy(), num_workers=num_workers)
    assert torch.equal(before, torch.get_rng_state())


def test_randomness_belongs_to_the_samples_place_in_the_run() -> None:
    noise = run(9, dataset=Noisy(), name="noise")
    assert run(9, dataset=Noisy(), name="noise", num_workers=2, micro_batch=2) == noise
    flat = [value for step in noise for value in step]
    assert len(set(flat)) == len(flat)


def test_closing_ends_the_workers_and_the_loader_goes_on_afterwards() -> None:
    loader = Loader(Numbers(), global_batch=8, seed=1, num_workers=2)
    loader.next()
    assert len(multiprocessing.active_children()) >= 2
    workers = multiprocessing.active_children()
    loader.close()
    wait_for(lambda: not any(worker.is_alive() for worker in workers), what="the workers' end")
    assert ids(loader.next()) == REFERENCE[1]
    loader.close()


def test_workers_survive_the_signals_of_pre_emption() -> None:
    loader = Loader(Numbers(), global_batch=8, seed=1, num_workers=1)
    loader.next()
    # From another process, as a scheduler does it; the trainer's own SIGTERM ends them.
    for worker in multiprocessing.active_children():
        subprocess.run(["kill", "-INT", str(worker.pid)], check=True)
        subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    assert [ids(loader.next()) for _ in range(8)] == REFERENCE[1:]
    loader.close()


def test_a_program_that_fails_without_closing_the_loader_still_ends() -> None:
    program = (
        "from tests.unit.test_data_loader import Broken, Loader\n"
        "loader = Loader(Broken(), global_batch=8, num_workers=2)\n"
        "try:\n    loader.next()\nexcept Exception as error:\n    kept = error\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_in_the_dataset_surfaces(num_workers: int) -> None:
    with pytest.raises(DataError, match="is damaged"):
        run(1, dataset=Broken(), num_workers=num_workers)


@pytest.mark.parametrize(("world_size", "micro_batch"), [(2, 3), (16, None)])
def test_a_global_batch_that_cannot_be_split_is_refused(world_size: int, micro_batch: int | None) -> None:
    with pytest.raises(ConfigError, match="a global batch of 8 samples"):
        Loader(Numbers(), global_batch=8, world_size=world_size, micro_batch=micro_batch)


def test_empty_data_is_refused() -> None:
    with pytest.raises(DataError, match="no samples"):
        Loader(Numbers(0), global_batch=8)
    with pytest.raises(DataError, match="no samples"):
        list(evaluation_batches(Numbers(0), num_samples=8, micro_batch=2))


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("num_samples", [1, 7, 23, 100])
def test_evaluation_takes_the_same_samples_once_over_all_ranks(world_size: int, num_samples: int) -> None:
    def samples(world_size: int) -> list[int]:
        taken = []
        for rank in range(world_size):
            batches = evaluation_batches(
                Numbers(), num_samples=num_samples, micro_batch=2, rank=rank, world_size=world_size
            )
            taken += ids([batch for batch, counts in batches if counts])
        return sorted(taken)

    assert samples(world_size) == samples(1)
    assert len(samples(1)) == min(num_samples, 23)


def test_evaluation_spreads_over_the_whole_set_in_equally_many_batches_per_rank() -> None:
    ranks = [
        list(evaluation_batches(Numbers(100), num_samples=5, micro_batch=1, rank=rank, world_size=4))
        for rank in range(4)
    ]
    counted = [[batch for batch, counts in batches if counts] for batches in ranks]
    assert sorted(chain(*map(ids, counted))) == [0, 20, 40, 60, 80]
    assert [len(batches) for batches in ranks] == [2, 2, 2, 2]
    assert all(len(batch["id"]) == 1 for batches in ranks for batch, _ in batches)


def test_a_sample_that_is_no_dict_is_refused() -> None:
    class Pairs(Numbers):
        def __getitem__(self, index: int) -> Any:
            return index, index

    with pytest.raises(DataError, match="a sample of Pairs is a tuple"):
        run(1, dataset=Pairs())
