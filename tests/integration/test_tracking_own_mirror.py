"""A mirror that a user adds: it is this one class, and its name in the settings."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from harness.cli.main import main
from harness.errors import ConfigError, TrackingError
from harness.runlog.codec import Record
from harness.tracking import RunLog, start_mirrors, start_sampler, sync_run
from harness.tracking import mirrors as mirrors_module
from harness.tracking.mirror import Mirror, MirroredRun
from tests.support.side_process import let_it_take_its_share

NAME = f"{__name__}:LossFile"
QUIET: dict[str, Any] = {"system_every_s": 0.0, "alerts": (), "tensorboard": False}


@pytest.fixture(autouse=True)
def takes_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    let_it_take_its_share(monkeypatch)


class LossFile(Mirror):
    """A line for each loss."""

    def __init__(self, run: MirroredRun, state: Mapping[str, Any]) -> None:
        self._file = (run.directory / "losses.txt").open("ab")
        self._file.truncate(state.get("size", 0))  # what came after the last commit comes again

    def take(self, record: Record) -> None:
        if "train/loss" in record.values:
            self._file.write(f"{record.step} {record.values['train/loss']}\n".encode())

    def commit(self) -> dict[str, Any]:
        self._file.flush()
        return {"size": self._file.tell()}

    def close(self, end: Mapping[str, Any] | None) -> dict[str, Any]:
        return self.commit()


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def write(log: RunLog, steps: range) -> None:
    for step in steps:
        log.write("step", {"train/loss": float(step)}, step=step)


def lines(run_dir: Path) -> list[str]:
    path = run_dir / "losses.txt"
    return path.read_text().splitlines() if path.exists() else []


def expected(num_steps: int) -> list[str]:
    return [f"{step} {float(step)}" for step in range(num_steps)]


def test_it_is_kept_in_step_and_its_killed_process_is_started_again(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        handle = start_mirrors(tmp_path, mirrors=(NAME,), **QUIET)
        write(log, range(10))
        wait_until(lambda: lines(tmp_path) == expected(10))
        first = handle.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        write(log, range(10, 20))
        wait_until(lambda: lines(tmp_path) == expected(20))
        assert handle.pid not in (first, None)
        write(log, range(20, 30))
    assert handle.close(30)
    assert lines(tmp_path) == expected(30)


def test_a_process_killed_while_it_is_waited_for_is_started_again(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        handle = start_mirrors(tmp_path, mirrors=(NAME,), **QUIET)
        write(log, range(10))
    assert handle.pid is not None
    os.kill(handle.pid, signal.SIGKILL)
    assert handle.close(30)
    assert lines(tmp_path) == expected(10)


def test_a_process_that_cannot_be_kept_alive_is_given_up_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirrors_module, "_SIDE", "no.such.module")
    with RunLog(tmp_path) as log:
        handle = start_mirrors(tmp_path, **QUIET)
        write(log, range(3))
        wait_until(lambda: bool(caplog.messages))
    assert not handle.close(30)
    [said] = caplog.messages
    assert "ended 3 times, at last with 1" in said
    assert "harness sync" in said


def test_it_is_synced_by_name_and_rebuilt(tmp_path: Path) -> None:
    with RunLog(tmp_path / "runs" / "one") as log:
        write(log, range(5))
    run_dir = tmp_path / "runs" / "one"
    assert main(["sync", "one", "--runs", str(tmp_path / "runs"), "--mirror", NAME]) == 0
    assert lines(run_dir) == expected(5)
    assert not (run_dir / "tensorboard").exists()
    (run_dir / "losses.txt").unlink()
    assert sync_run(run_dir, mirrors=[NAME], rebuild=True) == [NAME]
    assert lines(run_dir) == expected(5)


def test_a_later_sync_knows_it(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        handle = start_mirrors(tmp_path, mirrors=(NAME,), **QUIET)
        assert handle.close(30)
        write(log, range(5))
    assert sync_run(tmp_path) == [NAME]
    assert lines(tmp_path) == expected(5)


def test_what_is_no_mirror_is_refused(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        write(log, range(1))
    with pytest.raises(TrackingError, match="there is no mirror 'tensorbord'"):
        sync_run(tmp_path, mirrors=["tensorbord"])
    with pytest.raises(ConfigError, match=r"package\.module:Class"):
        sync_run(tmp_path, mirrors=["a b:c"])
    with pytest.raises(TrackingError, match=r"pathlib:Path is .*class made from"):
        sync_run(tmp_path, mirrors=["pathlib:Path"], timeout_s=1.0)


def test_other_nodes_have_no_mirrors(tmp_path: Path) -> None:
    settings = mirrors_module.MirrorSettings(mirrors=(NAME,), system_every_s=0.05)
    with RunLog(tmp_path) as log:
        write(log, range(3))
        handle = start_sampler(tmp_path, settings)
        folder = tmp_path / "log" / "nodes"
        wait_until(lambda: any(path.stat().st_size for path in folder.glob("*/*.jsonl")))
        assert handle.close(30)
    [path] = folder.glob("*/*.jsonl")
    sampled = json.loads(path.read_text().splitlines()[0])
    assert sampled["kind"] == "system"
    assert not (tmp_path / "log" / "mirrors").exists()
    assert not (tmp_path / "tensorboard").exists()
    assert lines(tmp_path) == []
