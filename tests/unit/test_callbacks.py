"""Callbacks: called at set points of a run, with state in its checkpoints, and by name when they fail."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from harness import Callback, StepRecord, TrainConfig
from harness.checkpoint import Checkpointer, SaveOutcome
from harness.data import Task
from harness.errors import ConfigError, TaskError
from harness.tracking import open_run
from harness.training import train
from harness.training.callbacks import Rollback, Training
from tests.support.own_tasks import own_config, points_task, run_loop

HERE = "tests.unit.test_callbacks"


def points(config: TrainConfig) -> Task:
    return points_task()


class Notebook(Callback):
    """Writes down what it is called with."""

    def __init__(self, config: TrainConfig | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.num_steps = 0

    def on_step(self, run: Training, record: StepRecord) -> None:
        self.num_steps += 1
        self.calls.append(("step", record.step, run.in_flight[record.step].samples))
        run.log({"mine/doubled_loss": 2 * record.loss}, step=record.step)

    def on_eval(self, run: Training, step: int, metrics: Mapping[str, float]) -> None:
        self.calls.append(("eval", step, "val/loss" in metrics))

    def on_saved(self, run: Training, outcome: SaveOutcome) -> None:
        self.calls.append(("saved", outcome.step, outcome.error))

    def on_rollback(self, run: Training, rollback: Rollback) -> None:
        self.calls.append(("rollback", rollback.step, rollback.record.step))

    def on_end(self, run: Training, status: str) -> None:
        self.calls.append(("end", status))

    def state_dict(self) -> dict[str, Any]:
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.num_steps = state["num_steps"]


class Broken(Callback):
    def on_step(self, run: Training, record: StepRecord) -> None:
        if record.step == 1:
            raise ValueError("no second step for me")

    def on_end(self, run: Training, status: str) -> None:
        raise OSError(f"nor an end: {status}")


class Leaves(Callback):
    """As a library that calls `sys.exit()` does."""

    def __init__(self, hook: str) -> None:
        self.hook = hook

    def on_step(self, run: Training, record: StepRecord) -> None:
        self._leave("on_step")

    def on_end(self, run: Training, status: str) -> None:
        self._leave("on_end")

    def state_dict(self) -> dict[str, Any]:
        self._leave("state_dict")
        return {}

    def _leave(self, hook: str) -> None:
        if hook == self.hook:
            raise SystemExit(0)


def no_callback(config: TrainConfig) -> int:
    return 1


def test_each_hook_is_called_where_it_belongs(tmp_path: Path) -> None:
    notebook = Notebook()
    config = own_config(
        tmp_path,
        points,
        "--loop.steps=4",
        "--loop.eval_every=2",
        "--checkpoint.every=2",
        "--guard.lag_steps=1",
    )
    run_loop(config, callbacks=[notebook])
    assert [call for call in notebook.calls if call[0] != "saved"] == [
        ("step", 0, (0, 8)),
        ("step", 1, (8, 16)),
        ("eval", 1, True),
        ("step", 2, (16, 24)),
        ("step", 3, (24, 32)),
        ("eval", 3, True),
        ("end", "finished"),
    ]
    assert [call for call in notebook.calls if call[0] == "saved"] == [("saved", 2, None), ("saved", 4, None)]
    run = open_run(tmp_path / "runs" / "own")
    losses = run.scalars("train/loss").values
    assert run.scalars("mine/doubled_loss").values.tolist() == [2 * loss for loss in losses]


def test_state_comes_back_with_the_checkpoint_and_a_new_callback_begins_without(tmp_path: Path) -> None:
    named = own_config(tmp_path, points, f"--callbacks=[{HERE}:Notebook]")
    run_loop(named)
    more, late = Notebook(), Notebook()
    config = own_config(tmp_path, points, "--loop.steps=8")
    run_loop(config, callbacks=[more, late])
    assert (more.num_steps, late.num_steps) == (8, 2)


def test_a_checkpoint_of_a_run_without_callbacks_serves_one_with_them(tmp_path: Path) -> None:
    class Older(Checkpointer):
        def save(self, step: int, state: Any, **more: Any) -> bool:
            return super().save(
                step, {key: part for key, part in state.items() if key != "callbacks"}, **more
            )

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("harness.training.build.Checkpointer", Older)
        run_loop(own_config(tmp_path, points))
    notebook = Notebook()
    run_loop(own_config(tmp_path, points, "--loop.steps=8"), callbacks=[notebook])
    assert notebook.num_steps == 2


def test_a_rollback_is_told_and_takes_the_state_back(tmp_path: Path) -> None:
    notebook = Notebook()
    config = own_config(
        tmp_path,
        points,
        "--loop.steps=12",
        "--checkpoint.every=2",
        "--checkpoint.healthy_after=1",
        "--guard.max_consecutive_skips=1",
        "--guard.rollback_skip_steps=1",
        "--faults=[{step: 6}, {step: 7}]",
    )
    run_loop(config, callbacks=[notebook])
    [rollback] = [call for call in notebook.calls if call[0] == "rollback"]
    assert rollback[2] == 7
    assert rollback[1] < 6
    assert notebook.num_steps == 12  # those of the branch that was left are forgotten
    assert notebook.calls[-1] == ("end", "finished")


def test_what_a_callback_raises_ends_the_run_with_its_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = own_config(tmp_path, points, f"--callbacks=[{HERE}:Notebook, {HERE}:Broken]")
    with pytest.raises(
        TaskError, match=rf"the callback {HERE}:Broken.on_step raised ValueError: no second step"
    ):
        run_loop(config)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (f"{HERE}:Notebok", r"id you mean tests.unit.test_callbacks:Notebook\?"),
        (f"{HERE}:no_callback", "returned int"),
        ("no.such:thing", "there is no module 'no'"),
        ("Notebook", "it has to be package.module:function"),
    ],
)
def test_a_callback_that_cannot_be_had_is_refused_before_anything_is_written(
    tmp_path: Path, spec: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_loop(own_config(tmp_path, points, f"--callbacks=[{spec}]"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("hook", ["on_step", "on_end", "state_dict"])
def test_an_exit_in_a_callback_is_an_error_and_not_the_end_of_the_program(tmp_path: Path, hook: str) -> None:
    with pytest.raises(TaskError, match=rf"Leaves.{hook} raised SystemExit: 0"):
        run_loop(own_config(tmp_path, points), callbacks=[Leaves(hook)])


def test_an_exit_in_the_hook_of_an_end_does_not_take_the_errors_place(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="no second step"):
        train(own_config(tmp_path, points), callbacks=[Broken(), Leaves("on_end")])
