"""Silent errors in the trainer's own loop: said in the log as events, and by a few steps before the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness import TrainConfig
from harness.data import Task
from harness.runlog import events
from harness.runlog.reader import open_run
from harness.training.silent import first_loss_problem
from harness.training.trial import training_checks
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
