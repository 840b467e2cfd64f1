"""Silent errors in the trainer's own loop: said in the log as events, and by a few steps before the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness import TrainConfig
from harness.data import Task
from harness.runlog import events
from harness.runlog.reader import open_run
from harness.training.silent import first_loss_problem, held_out_problem
from harness.training.trial import training_checks
from harness.training.trial_checks import State, difference
from tests.support.own_tasks import ALONE, Points, own_config, points_task, run_loop


class Stuck(Points):
    """Gives one and the same sample, whatever the index."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return super().__getitem__(3)


def stuck(config: TrainConfig) -> Task:
    return points_task(train_data=Stuck())


def points(config: TrainConfig) -> Task:
    return points_task()


def found_in(folder: Path) -> list[str | None]:
    logged = [event.what for event in open_run(folder / "runs" / "own").events("finding")]
    return [what.check for what in logged if isinstance(what, events.Finding)]


def test_a_data_set_that_ignores_its_index_is_an_event_of_the_run(tmp_path: Path) -> None:
    run_loop(own_config(tmp_path, stuck, "--loop.steps=14"))
    assert found_in(tmp_path) == ["constant batch"]


def test_a_sound_run_says_nothing(tmp_path: Path) -> None:
    run_loop(own_config(tmp_path, points, "--loop.steps=14", "--loop.eval_every=5"))
    assert found_in(tmp_path) == []


def test_a_first_loss_is_about_that_of_guessing() -> None:
    assert first_loss_problem(5.6, 256) is None
    assert first_loss_problem(40.0, 256) is not None
    assert first_loss_problem(0.1, 256) is not None


def test_a_few_steps_before_the_run_find_the_same_and_leave_nothing(tmp_path: Path) -> None:
    findings = training_checks(own_config(tmp_path, stuck, "--loop.steps=400"), ALONE)
    assert [finding.check for finding in findings] == ["constant batch"]
    assert not (tmp_path / "runs").exists()


class Forgetful(nn.Module):
    """Counts its forward passes in training mode, and keeps that in no checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.count = nn.Linear(4, 1), 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += self.training
        return self.inner(x) + 0.1 * self.count


class Unsteady(nn.Module):
    """Normalises by statistics that never arrive where they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(4, 1), nn.BatchNorm1d(4, momentum=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.norm(1000 * x + 5000))


def forgetful(config: TrainConfig) -> Task:
    return points_task(model=Forgetful())


def unsteady(config: TrainConfig) -> Task:
    torch.manual_seed(0)
    return points_task(model=Unsteady())


def checks_of(folder: Path, build: Any, *settings: str) -> list[str]:
    return [finding.check for finding in training_checks(own_config(folder, build, *settings), ALONE)]


def test_what_is_in_no_checkpoint_is_named_before_the_run(tmp_path: Path) -> None:
    assert checks_of(tmp_path, forgetful, "--loop.steps=400") == ["checkpoint"]
    assert checks_of(tmp_path, points, "--loop.steps=400") == []


def test_an_eval_mode_that_gives_another_loss_is_named_before_the_run(tmp_path: Path) -> None:
    assert "eval mode" in checks_of(tmp_path, unsteady, "--loop.steps=400", "--optim.lr=0.001")


def test_a_state_that_does_not_come_back_is_named() -> None:
    saved = State(step=24, loss=1.0, names=("a", "b"), sums=[[3, 4], [3, 5]])
    assert difference(saved, saved) is None
    read = State(step=24, loss=1.0, names=("a", "b"), sums=[[3, 4], [3, 6]])
    finding = difference(saved, read)
    assert finding is not None
    assert (finding.rank, finding.parameter) == (1, "b")


def test_a_held_out_loss_of_the_first_epoch_is_about_that_of_training() -> None:
    assert held_out_problem(2.5, 2.0, first_loss=5.0) is None
    assert held_out_problem(9.0, 2.0, first_loss=5.0) is not None
    assert held_out_problem(0.04, 0.01, first_loss=5.0) is None  # both are as good as nothing
