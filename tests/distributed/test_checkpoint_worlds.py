"""A checkpoint loads at any world size and between DDP, FSDP2 and one process, bit for bit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from harness.checkpoint import Checkpointer, PerRank, Rng, writer
from harness.config import OptimConfig, ParallelConfig
from harness.dist import World, distribute, plain
from harness.errors import CheckpointError
from harness.training.optim import build_optimizers
from tests.support.checkpoints import TinyModel, TinyRun, digest, whole
from tests.support.distributed import run_ranks


def save_run(rank: int, world_size: int, directory: str, kind: str) -> dict[str, torch.Tensor]:
    run = TinyRun(kind, rank, world_size)
    run.train(3)
    with Checkpointer(directory) as checkpointer:
        checkpointer.save(run.step, run.state())
        expected = whole(run)
        run.train(2)  # writing goes on meanwhile and must not see this
    return expected


def load_run(rank: int, world_size: int, directory: str, kind: str) -> tuple[int, dict[str, torch.Tensor]]:
    run = TinyRun(kind, rank, world_size, seed=1)
    with Checkpointer(directory) as checkpointer:
        step = checkpointer.load(run.state())
    assert step == run.step
    loaded = whole(run)
    run.train(1)  # what was loaded can be trained on
    return step, loaded


@pytest.mark.parametrize(("kind", "world_size"), [("plain", 1), ("ddp", 2), ("fsdp", 2), ("fsdp", 4)])
def test_a_checkpoint_loads_bit_for_bit_in_every_other_shape(
    tmp_path: Path, kind: str, world_size: int
) -> None:
    expected = run_ranks(save_run, world_size, str(tmp_path), kind)[0]
    for other, size in [("plain", 1), ("ddp", 2), ("fsdp", 3), ("fsdp", 4)]:
        for step, loaded in run_ranks(load_run, size, str(tmp_path), other):
            assert step == 3
            assert loaded.keys() == expected.keys()
            for name, tensor in expected.items():
                assert torch.equal(loaded[name], tensor), (other, size, name)


def resume_exactly(rank: int, world_size: int, directory: str, kind: str) -> tuple[str, str]:
    run = TinyRun(kind, rank, world_size, dropout=0.3)
    with Checkpointer(directory) as checkpointer:
        run.train(3)
        checkpointer.save(run.step, run.state())
        run.train(4)
        uninterrupted = digest(run)
        resumed = TinyRun(kind, rank, world_size, dropout=0.3, seed=5)
        checkpointer.load(resumed.state())
        resumed.train(4)
        return uninterrupted, digest(resumed)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_resumed_run_with_dropout_is_the_uninterrupted_one_on_every_rank(tmp_path: Path, kind: str) -> None:
    outcomes = run_ranks(resume_exactly, 2, str(tmp_path), kind)
    assert all(uninterrupted == resumed for uninterrupted, resumed in outcomes)
    assert outcomes[0] != outcomes[1]  # each rank has random numbers of its own


def roll_back(
    rank: int, world_size: int, directory: str, kind: str, in_memory: bool
) -> tuple[int, bool, bool]:
    run = TinyRun(kind, rank, world_size, dropout=0.3)
    with Checkpointer(directory, healthy_after=2, in_memory=in_memory) as checkpointer:
        seen = {}
        while run.step < 6:
            run.train(1)
            checkpointer.observe(run.step)
            seen[run.step] = digest(run)
            checkpointer.save(run.step, run.state())
        step = checkpointer.rollback(run.state())
        restored = digest(run) == seen[step]
        run.train(2)
        return step, restored, digest(run) == seen[step + 2]


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_all_ranks_roll_back_to_the_same_healthy_state(tmp_path: Path, kind: str, in_memory: bool) -> None:
    assert run_ranks(roll_back, 2, str(tmp_path), kind, in_memory) == [(4, True, True)] * 2


def save_hybrid(rank: int, world_size: int, directory: str) -> tuple[int, dict[str, torch.Tensor]]:
    """Two groups of two: sharded within, replicated between."""
    run = TinyRun("hsdp", rank, world_size)
    run.train(1)
    with Checkpointer(directory) as checkpointer:
        checkpointer.save(run.step, run.state())
    return run.step, whole(run)


def test_hybrid_sharding_is_saved_once_and_loads_anywhere(tmp_path: Path) -> None:
    step, expected = run_ranks(save_hybrid, 4, str(tmp_path))[0]
    assert step == 1
    for kind, size in [("plain", 1), ("fsdp", 2)]:
        _, loaded = run_ranks(load_run, size, str(tmp_path), kind)[0]
        assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    shards = [os.path.getsize(path) for path in (tmp_path / "step-00000001").glob("*.safetensors")]
    assert sum(shards) < 1.5 * sum(t.nbytes for t in expected.values()) + 4 * 16384


def save_apart(rank: int, world_size: int, directory: str) -> str:
    """Rank 1 sees a disk of its own under the same name."""
    write = writer.write_shard
    if rank == 1:
        writer.write_shard = lambda path, *args: write(Path(f"{directory}-{rank}.safetensors"), *args)
    with Checkpointer(directory) as checkpointer:
        checkpointer.save(1, {"x": torch.ones(3)})
        with pytest.raises(CheckpointError) as caught:
            checkpointer.wait()
        return str(caught.value)


def test_a_directory_that_is_not_shared_is_noticed_before_the_commit(tmp_path: Path) -> None:
    for said in run_ranks(save_apart, 2, str(tmp_path / "own")):
        assert "rank-00001.safetensors was written but is not in" in said
        assert "shared directory" in said
    assert os.listdir(tmp_path / "own") == []


def bytes_by_rank(rank: int, world_size: int, directory: str) -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(8)))
    with Checkpointer(directory) as checkpointer:
        checkpointer.save(1, {"model": torch.nn.parallel.DistributedDataParallel(model)})


def test_replicated_state_is_written_once_and_spread_over_the_ranks(tmp_path: Path) -> None:
    run_ranks(bytes_by_rank, 2, str(tmp_path))
    sizes = [os.path.getsize(path) for path in sorted((tmp_path / "step-00000001").glob("*.safetensors"))]
    whole_bytes = 8 * (64 * 64 + 64) * 4
    assert sum(sizes) < whole_bytes + 4096
    assert max(sizes) < 0.6 * whole_bytes


def save_buffers(rank: int, world_size: int, directory: str) -> float:
    model = torch.nn.BatchNorm1d(4)
    model.running_mean.fill_(float(rank))
    with Checkpointer(directory) as checkpointer:
        checkpointer.save(1, {"model": model})
        model.running_mean.fill_(-1.0)
        checkpointer.load({"model": model})
    return float(model.running_mean[0])


def test_buffers_that_differ_between_ranks_are_rank_zeros(tmp_path: Path) -> None:
    assert run_ranks(save_buffers, 2, str(tmp_path)) == [0.0, 0.0]


def save_per_rank(rank: int, world_size: int, directory: str) -> None:
    torch.manual_seed(10 + rank)
    with Checkpointer(directory) as checkpointer:
        checkpointer.save(1, {"rng": Rng(), "own": PerRank({"rank": rank, "t": torch.full((2,), rank)})})


def load_per_rank(rank: int, world_size: int, directory: str) -> tuple[int, int, float]:
    own = PerRank(None)
    with Checkpointer(directory) as checkpointer:
        checkpointer.load({"rng": Rng(), "own": own})
    return own.value["rank"], int(own.value["t"][0]), float(torch.rand(()))


def test_per_rank_values_follow_the_rule_for_a_changed_world_size(tmp_path: Path) -> None:
    run_ranks(save_per_rank, 2, str(tmp_path))
    draws = [float(torch.rand((), generator=torch.Generator().manual_seed(10 + rank))) for rank in range(2)]
    assert run_ranks(load_per_rank, 1, str(tmp_path)) == [(0, 0, draws[0])]
    four = run_ranks(load_per_rank, 4, str(tmp_path))
    assert [own for own, _, _ in four] == [0, 1, 0, 1]
    assert [draw for _, _, draw in four[:2]] == draws
    assert (
        len({draw for _, _, draw in four}) == 4
    )  # a rank without a state of its own leaves its donor's stream


def disagree(rank: int, world_size: int, directory: str) -> str:
    with Checkpointer(directory) as checkpointer:
        try:
            checkpointer.save(rank, {"x": 1})
        except CheckpointError as error:
            return str(error)
    return ""


def test_ranks_at_different_steps_are_told_so_on_all_ranks(tmp_path: Path) -> None:
    outcomes = run_ranks(disagree, 2, str(tmp_path))
    assert all("steps [0, 1]" in said for said in outcomes)


def fail_on_rank_one(rank: int, world_size: int, directory: str) -> str:
    class Bad:
        def state_dict(self) -> dict[str, object]:
            if rank == 1:
                raise OSError("no device")
            return {}

    with Checkpointer(directory) as checkpointer:
        try:
            checkpointer.save(1, {"bad": Bad()})
        except CheckpointError as error:
            return str(error)
    return ""


def test_what_fails_on_one_rank_fails_on_all_with_its_name(tmp_path: Path) -> None:
    outcomes = run_ranks(fail_on_rank_one, 2, str(tmp_path))
    assert all("rank 1: OSError: no device" in said for said in outcomes)


def go_on(
    world: World, directory: str, strategy: str, optimizer_name: str, *seeds: int
) -> dict[str, torch.Tensor]:
    """Loads what there is, trains a step per seed, saves, and gives the weights."""
    torch.manual_seed(0)
    model = distribute(TinyModel(), ParallelConfig(strategy=strategy), world)  # type: ignore[arg-type]
    settings = OptimConfig(name=optimizer_name, lr=0.05)  # type: ignore[arg-type]
    optimizers = build_optimizers(model, settings, is_sharded=strategy == "fsdp")
    state = {"model": plain(model), **optimizers}
    with Checkpointer(directory) as checkpointer:
        step = checkpointer.load(state) or 0
        for seed in seeds:
            tokens = torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(seed))
            model(tokens).square().mean().backward()
            for optimizer in optimizers.values():
                optimizer.step()
                optimizer.zero_grad()
        checkpointer.save(step + len(seeds), state)
    weights = plain(model).state_dict()
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in weights.items()}


def reshard_every_optimizer(rank: int, world_size: int, directory: str) -> list[str]:
    world = World(rank=rank, local_rank=rank, world_size=world_size, device=torch.device("cpu"))
    wrong = []
    for optimizer in ("adamw", "sgd", "adagrad", "muon"):
        whole = go_on(world, f"{directory}/{optimizer}", "ddp", optimizer, 0, 1, 2, 3)
        for before, after in (("ddp", "fsdp"), ("fsdp", "ddp")):
            parts = f"{directory}/{optimizer}-{before}"
            go_on(world, parts, before, optimizer, 0, 1)
            resumed = go_on(world, parts, after, optimizer, 2, 3)
            if not all(torch.allclose(resumed[n], whole[n], rtol=1e-5, atol=1e-6) for n in whole):
                wrong.append(f"{optimizer} from {before} to {after}")
    return wrong


def test_every_optimizer_goes_on_sharded_or_not(tmp_path: Path) -> None:
    assert run_ranks(reshard_every_optimizer, 2, str(tmp_path)) == [[], []]
