"""`harness.agent` ends as its program did, so that what started it knows whether to start it again."""

from __future__ import annotations

import dataclasses
import signal
import sys
from pathlib import Path

import pytest

from harness.cli.train import EXIT_STOPPED
from tests.support import operations
from tests.support.operations import begin, judge_stop
from tests.support.runs import program, tiny

LAUNCHER = [
    sys.executable,
    "-m",
    "harness.agent",
    "--standalone",
    "--nproc-per-node=2",
    "--max-restarts=3",
]


@pytest.mark.slow
def test_a_wrong_setting_is_told_from_a_process_that_died(tmp_path: Path) -> None:
    code, output = program(tiny(tmp_path, "--loop.stepz=3"), launcher=LAUNCHER)
    assert code == 2
    assert output.count("ConfigError") == 1
    code, output = program(
        ["-c", "raise SystemExit(3)"], launcher=[*LAUNCHER[:-1], "--no-python"], target=sys.executable
    )
    assert code == 1, output


@pytest.mark.slow
def test_a_run_that_was_stopped_and_saved_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(operations._COMMANDS, "torchrun", tuple(LAUNCHER))
    run = begin("torchrun", tmp_path, "--loop.steps=100000")
    run.wait_for_step(3)
    stop = judge_stop(run, signal.SIGTERM)
    assert stop.exit_code == EXIT_STOPPED, stop
    assert dataclasses.replace(stop, exit_code=1).troubles("torchrun", signal.SIGTERM) == []
