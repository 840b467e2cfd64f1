"""What a run that ends says it has saved is on disk, whatever the disk or a rollback did before."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from harness import Callback, TrainConfig
from harness.checkpoint import writer
from harness.data import Task
from harness.errors import CheckpointError
from harness.runlog.reader import open_run
from harness.training import train
from harness.training.loop import Run
from tests.support.own_tasks import own_config, points_task, run_loop

HERE = "tests.unit.test_last_save"


def points(config: TrainConfig) -> Task:
    return points_task()


class StopsAt(Callback):
    """Asks for the end once the record of a step has arrived."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, run: Any, record: Any) -> None:
        if record.step == self.step:
            run.stop.requested = True


@pytest.mark.parametrize("stop_at", [2, 99], ids=["stopped", "finished"])
@pytest.mark.parametrize("every", [1, 5], ids=["dropped before", "dropped at the end"])
def test_the_last_step_is_saved_though_saves_are_dropped_while_the_disk_is_busy(
    every: int, stop_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = writer.write_shard

    def slow(*args: Any) -> Any:
        time.sleep(0.2)
        return write(*args)

    monkeypatch.setattr(writer, "write_shard", slow)
    settings = ["--checkpoint.when_busy=drop", f"--checkpoint.every={every}"]
    run = run_loop(own_config(tmp_path, points, *settings), callbacks=[StopsAt(stop_at)])
    assert run.checkpointer.steps()[-1] == run.counters.step


ROLLS_BACK = [
    "--loop.steps=12",
    "--checkpoint.every=2",
    "--checkpoint.healthy_after=1",
    "--guard.lag_steps=1",
    "--guard.max_consecutive_skips=1",
    "--guard.rollback_skip_steps=4",
    "--faults=[{step: 6}, {step: 7}]",
]


@pytest.mark.parametrize("in_memory", ["true", "false"])
def test_a_stop_right_after_a_rollback_keeps_what_was_skipped(tmp_path: Path, in_memory: str) -> None:
    config = own_config(tmp_path, points, *ROLLS_BACK, f"--checkpoint.in_memory={in_memory}")
    stopped = run_loop(config, callbacks=[StopsAt(5)])  # heard with the record that rolls back
    assert stopped.ladder.num_rollbacks == 1
    assert stopped.counters.step < 6
    resumed: list[Run] = []

    class Starts(Callback):
        def on_step(self, run: Any, record: Any) -> None:
            if not resumed:
                resumed.append(run)
                assert run.in_flight[record.step].samples[0] == stopped.loader.position

    after = run_loop(config, callbacks=[Starts()])
    assert after.ladder.num_rollbacks == 1
    assert after.counters.num_skips == stopped.counters.num_skips


def test_a_last_save_that_fails_is_in_the_log_and_its_error_is_the_one_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FailsToo(Callback):
        def on_saved(self, run: Any, outcome: Any) -> None:
            raise ValueError("of this hook")

    def full(*args: Any) -> Any:
        raise CheckpointError("the disk is full")

    monkeypatch.setattr(writer, "write_shard", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        train(own_config(tmp_path, points), callbacks=[FailsToo()])
    [failed] = open_run(tmp_path / "runs" / "own").events("checkpoint_failed")
    assert "the disk is full" in str(failed)
