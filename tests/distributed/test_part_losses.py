"""The training loss of each part of the data: exact, equal on all ranks, in the log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.config import TrainConfig
from harness.data import LossSum, Task
from harness.dist import World
from harness.records import StepRecord
from harness.runlog.reader import open_run
from harness.training import Callback
from tests.support.distributed import run_ranks
from tests.support.own_tasks import Points, own_config, points_task, run_loop


class Numbered(Points):
    """Sample i belongs to part i % 3, but the third part has no samples."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**super().__getitem__(index), "part": torch.tensor(index % 2)}


def by_parts(model: nn.Module, batch: dict[str, Tensor]) -> LossSum:
    losses = (model(batch["x"]) - batch["y"]).square().squeeze(1)
    ones = torch.ones_like(losses)
    sums = torch.zeros(3, 2, dtype=torch.float64)
    sums.index_add_(0, batch["part"], torch.stack([losses, ones], 1).detach().double())
    return LossSum(losses.sum(), float(len(losses)), 0, sums)


def build(config: TrainConfig) -> Task:
    return points_task(
        train_data=Numbered(), val_data=Numbered(8), loss=by_parts, parts=("even", "odd", "none")
    )


class _Keeps(Callback):
    """Of each step its record, and how many of its samples are odd."""

    def __init__(self) -> None:
        self.steps: list[tuple[StepRecord, int]] = []

    def on_step(self, run: Any, record: StepRecord) -> None:
        indices = run.loader.step_indices(run.in_flight[record.step].samples[0])
        self.steps.append((record, sum(index % 2 for index in indices)))


def _trained(rank: int, world_size: int, folder: str) -> list[dict[str, float]]:
    config = own_config(Path(folder), build, "--loop.micro_batch=2")
    kept = _Keeps()
    world = World(rank=rank, local_rank=rank, world_size=world_size, device=torch.device("cpu"))
    run_loop(config, world, [kept])
    for record, num_odd in kept.steps:
        even, odd = (record.measured[f"train/loss/{name}"] for name in ("even", "odd"))
        assert (even * (8 - num_odd) + odd * num_odd) / 8 == pytest.approx(record.loss, rel=1e-6)
        assert even != odd
        assert "train/loss/none" not in record.measured
    assert len(kept.steps) == 6
    return [dict(record.measured) for record, _ in kept.steps]


def test_parts_have_a_training_loss_of_their_own_equal_on_all_ranks(tmp_path: Path) -> None:
    one, other = run_ranks(_trained, 2, str(tmp_path))
    assert one == other
    logged = open_run(tmp_path / "runs" / "own").scalars("train/loss/odd").values.tolist()
    assert logged == [measured["train/loss/odd"] for measured in one]
