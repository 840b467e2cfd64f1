"""What samples draw, from torch, numpy or Python, belongs to their place in the run and to nothing else."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, Subset

from harness.config import TrainConfig
from harness.data import Loader, Task
from tests.support.own_tasks import Drawing, own_config, points_task, run_loop, squared_error


class Draws(Dataset[Any]):
    """What each of the three generators gives."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"drawn": torch.tensor([torch.rand(()).item(), np.random.rand(), random.random()])}


class DrawsAtOnce(Draws):
    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        return {"drawn": np.stack([self[index]["drawn"].numpy() for index in indices])}


SETS = {"one by one": Draws(), "at once": DrawsAtOnce(), "subset": Subset(Draws(), list(range(24)))}


def drawn(dataset: Any, *, steps: range = range(6), **settings: Any) -> torch.Tensor:
    """`[samples, 3]` of `steps`, over all ranks, in global order."""
    world_size = settings.pop("world_size", 1)
    shares: list[list[torch.Tensor]] = [[] for _ in steps]
    for rank in range(world_size):
        loader = Loader(dataset, global_batch=8, seed=3, rank=rank, world_size=world_size, **settings)
        loader.skip(8 * steps.start)
        for share in shares:
            share.extend(batch["drawn"] for batch in loader.next())
        loader.close()
    return torch.cat([batch for share in shares for batch in share])


@pytest.mark.parametrize("dataset", SETS.values(), ids=SETS)
def test_no_two_samples_ranks_or_epochs_draw_alike(dataset: Any) -> None:
    values = drawn(dataset, world_size=2, micro_batch=2)
    assert len(values.unique(dim=0)) == len(values) == 48
    assert all(len(column.unique()) == 48 for column in values.T)


@pytest.mark.parametrize("dataset", SETS.values(), ids=SETS)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_they_draw_the_same_with_workers_and_after_a_restart(dataset: Any, num_workers: int) -> None:
    whole = drawn(dataset, micro_batch=2)
    rest = drawn(dataset, micro_batch=2, num_workers=num_workers, steps=range(3, 6))
    assert torch.equal(whole[24:], rest)


@pytest.mark.parametrize("name", ["one by one", "subset"])
def test_single_samples_draw_the_same_in_any_world(name: str) -> None:
    assert torch.equal(drawn(SETS[name]), drawn(SETS[name], world_size=4, micro_batch=1))


@pytest.mark.parametrize("dataset", SETS.values(), ids=SETS)
def test_the_programs_own_generators_are_left_alone(dataset: Any) -> None:
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    drawn(dataset)
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1][1], np.random.get_state()[1])
    assert states[1][2:] == np.random.get_state()[2:]
    assert states[2] == random.getstate()


def noisy(config: TrainConfig) -> Task:
    weight = torch.tensor([[random.random(), np.random.rand(), 0.1, 0.2]])
    task = points_task(loss=noisy_loss, train_data=Drawing())
    task.model.weight.data.copy_(weight)
    return task


def noisy_loss(model: Any, batch: Any) -> Any:
    scale = 1 + 0.1 * random.random() + 0.1 * float(np.random.rand()) + 0.1 * torch.rand(())
    return squared_error(model, {**batch, "x": batch["x"] * scale})


def test_a_run_is_a_function_of_its_seed_and_resumes_bitwise_whatever_it_draws_from(tmp_path: Path) -> None:
    constant = "--schedule.kind=constant"
    ends = []
    for name, steps in (("whole", [6]), ("again", [6]), ("parts", [2, 6])):
        for number in steps:
            config = own_config(tmp_path, noisy, f"--name={name}", f"--loop.steps={number}", constant)
            ends.append(run_loop(config).model.weight.detach().clone())
    whole, again, _, parts = ends
    assert torch.equal(whole, again)
    assert torch.equal(whole, parts)
    other = run_loop(own_config(tmp_path, noisy, "--name=other", "--seed=5", constant))
    assert not torch.equal(whole, other.model.weight)
