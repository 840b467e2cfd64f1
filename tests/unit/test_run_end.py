"""The end of a run: every part is closed, the first error wins, and how it ended is written down."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import orjson
import psutil
import pytest

from harness.checkpoint import Checkpointer
from harness.config import TrainConfig
from harness.data import Loader
from harness.errors import CheckpointError, DataError, HarnessError, InstabilityError, TaskError
from harness.runlog.reader import open_run
from harness.stability import StepGuard
from harness.training import Callback, train
from tests.support.runs import tiny_config

UNSTABLE = ["--guard.nonfinite=stop", "--faults=[{step: 1, kind: nan}]"]


def ended(config: TrainConfig) -> dict[str, Any]:
    """What the log's `end` record says; it and the summary agree."""
    run_dir = Path(config.runs_dir) / config.name
    end = open_run(run_dir).end
    assert end is not None
    summary = orjson.loads((run_dir / "summary.json").read_bytes())
    assert (summary["status"], summary["reason"]) == (end["state"], end.get("reason"))
    return end


def fail_to_close(monkeypatch: pytest.MonkeyPatch, *parts: type) -> list[str]:
    """Makes `close` of these parts raise once it has closed; the names of those that were asked."""
    asked: list[str] = []
    for part in parts:
        close = part.close  # type: ignore[attr-defined]

        def failing(self: Any, *, part: type = part, close: Any = close, **options: Any) -> None:
            close(self, **options)
            asked.append(part.__name__)
            raise CheckpointError(f"{part.__name__} does not close")

        monkeypatch.setattr(part, "close", failing)
    return asked


class Raises(Callback):
    def on_step(self, run: Any, record: Any) -> None:
        if record.step == 2:
            raise ZeroDivisionError("of this test")


def test_the_error_that_ended_the_loop_wins_over_those_of_closing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, *UNSTABLE)
    asked = fail_to_close(monkeypatch, StepGuard, Loader, Checkpointer)
    with pytest.raises(InstabilityError):
        train(config)
    assert asked == ["StepGuard", "Loader", "Checkpointer"]
    assert ended(config)["state"] == "unstable"


def test_the_first_part_that_cannot_be_closed_is_the_error_of_a_run_that_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, "--loop.steps=2")
    asked = fail_to_close(monkeypatch, Loader, Checkpointer)
    with pytest.raises(CheckpointError, match="Loader does not close"):
        train(config)
    assert asked == ["Loader", "Checkpointer"]
    assert ended(config) == {"state": "crashed", "reason": "Loader does not close."}


def test_a_crash_is_written_down_and_the_log_is_let_go(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "--loop.steps=4")
    with pytest.raises(TaskError) as caught:
        train(config, callbacks=[Raises()])
    end = ended(config)
    assert end["state"] == "crashed"
    assert "ZeroDivisionError" in end["reason"]
    assert caught.value.restart_may_help  # steps were taken: it may have been the weather
    assert train(config).status == "finished"
    assert ended(config) == {"state": "finished"}


def test_an_error_before_the_first_step_is_there_at_every_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise TaskError("the loss cannot be computed")

    monkeypatch.setattr("harness.training.loop.rehearse", fails)
    config = tiny_config(tmp_path)
    with pytest.raises(HarnessError) as caught:
        train(config)
    assert not caught.value.restart_may_help
    assert ended(config)["state"] == "crashed"


def test_a_log_is_ended_if_another_rank_cannot_open_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails_elsewhere(action: Any, **_: Any) -> Any:
        result = action()
        if (Path(config.runs_dir) / config.name / "log").exists():
            raise DataError("rank 1 has no disk")
        return result

    config = tiny_config(tmp_path, "--loop.steps=2")
    monkeypatch.setattr("harness.training.opening.on_all_ranks", fails_elsewhere)
    with pytest.raises(DataError):
        train(config)
    monkeypatch.undo()
    end = open_run(Path(config.runs_dir) / config.name).end
    assert end == {"state": "crashed", "reason": "rank 1 has no disk."}
    assert train(config).status == "finished"


def test_a_training_imports_no_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture is drawn by the side process. Modules of harness that import it on top would show in
    `SOLE_IMPORTERS` of tests/architecture/test_layers.py."""
    looked_for: list[str] = []

    class Finder:
        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            looked_for.append(name.partition(".")[0])

    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    assert train(tiny_config(tmp_path, "--loop.steps=2")).status == "finished"
    assert "matplotlib" not in looked_for
    importlib.util.find_spec("matplotlib")
    assert "matplotlib" in looked_for


class StopsSideProcess(Callback):
    """Freezes the side process at the first step, and notes when the loop is over."""

    pid = 0
    loop_ended_s = 0.0

    def on_step(self, run: Any, record: Any) -> None:
        if not self.pid:
            (side,) = (p for p in psutil.Process().children() if str(run.directory) in " ".join(p.cmdline()))
            self.pid = side.pid
            side.suspend()

    def on_end(self, run: Any, status: str) -> None:
        self.loop_ended_s = time.monotonic()


def test_nobody_waits_for_mirrors_and_picture(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "--loop.steps=2", "--tracking.tensorboard=true")
    frozen = StopsSideProcess()
    try:
        train(config, callbacks=[frozen])
        assert time.monotonic() - frozen.loop_ended_s < 5  # it would be waited for 30 s
        assert not (Path(config.runs_dir) / "tiny/curves.png").exists()
    finally:
        if frozen.pid:  # 0 would be this whole group of processes
            os.kill(frozen.pid, signal.SIGKILL)
