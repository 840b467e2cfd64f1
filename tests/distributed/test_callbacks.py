"""Two ranks call the hooks of callbacks at the same steps, and one that fails on one rank is named."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from harness import Callback, StepRecord, TrainConfig
from harness.checkpoint import Checkpointer, SaveOutcome
from harness.data import Task
from harness.dist import World, report_once
from harness.training.callbacks import Training
from tests.support.distributed import RanksFailed, run_ranks
from tests.support.own_tasks import own_config, points_task, run_loop


def points(config: TrainConfig) -> Task:
    return points_task()


def world_of(rank: int, size: int) -> World:
    return World(rank=rank, local_rank=rank, world_size=size, device=torch.device("cpu"))


class Notebook(Callback):
    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def on_step(self, run: Training, record: StepRecord) -> None:
        self.calls.append(("step", record.step))

    def on_saved(self, run: Training, outcome: SaveOutcome) -> None:
        self.calls.append(("saved", outcome.step))


class FailsOnRank1(Callback):
    def on_step(self, run: Training, record: StepRecord) -> None:
        if run.world.rank == 1 and record.step == 1:
            raise ValueError("not here")


class Late(Checkpointer):
    """Says only some calls later that a save has ended: a slow disk."""

    calls, is_over = 0, False

    def wait(self) -> None:
        super().wait()
        self.is_over = True

    def outcomes(self) -> list[SaveOutcome]:
        self.calls += 1
        return super().outcomes() if self.calls % 5 == 0 or self.is_over else []


def told(rank: int, size: int, folder: str) -> list[tuple[str, int]]:
    notebook = Notebook()
    config = own_config(Path(folder), points, "--checkpoint.every=2", "--loop.steps=12")
    with patch("harness.training.build.Checkpointer", Late if rank else Checkpointer):
        run_loop(config, world_of(rank, size), callbacks=[notebook])
    return notebook.calls


def test_a_save_is_told_at_the_same_step_on_all_ranks_though_one_knows_later(tmp_path: Path) -> None:
    first, second = run_ranks(told, 2, str(tmp_path))
    assert first == second
    assert [step for hook, step in first if hook == "saved"] == [2, 4, 6, 8, 10, 12]


def failing(rank: int, size: int, folder: str) -> None:
    with report_once():
        run_loop(own_config(Path(folder), points), world_of(rank, size), callbacks=[FailsOnRank1()])


def test_a_callback_that_fails_on_one_rank_is_named_and_the_others_do_not_wait(tmp_path: Path) -> None:
    with pytest.raises(RanksFailed) as caught:
        run_ranks(failing, 2, str(tmp_path))
    name = f"{__name__}:FailsOnRank1.on_step"
    assert f"TaskError: the callback {name} raised ValueError: not here" in str(caught.value)
    assert "rank 1 failed, and this one with it" in str(caught.value)
