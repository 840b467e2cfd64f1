"""What the dashboard starts is recorded and waited for, or ended, whatever fails meanwhile."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from harness.dashboard import programs, server
from harness.dashboard.access import Access
from harness.dashboard.run_index import RunIndex
from harness.errors import LaunchError
from tests.support.runs import tiny_config


def test_an_indexer_that_is_restarted_while_the_dashboard_closes_is_ended_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_index, restarts = RunIndex(tmp_path), threading.Event()
    run_index.start()
    indexer = run_index._indexer
    assert isinstance(indexer, subprocess.Popen)
    indexer.send_signal(signal.SIGKILL)
    indexer.wait()
    start = RunIndex._start_indexer

    def slow_start(self: RunIndex) -> None:
        restarts.set()
        time.sleep(0.5)
        start(self)

    monkeypatch.setattr(RunIndex, "_start_indexer", slow_start)
    request = threading.Thread(target=run_index._send, args=({"refresh": True},))
    request.start()
    assert restarts.wait(10)
    run_index.close()
    request.join()
    last = run_index._indexer
    assert isinstance(last, subprocess.Popen)
    assert last.poll() is not None


def test_a_server_that_cannot_say_its_address_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    indexes: list[RunIndex] = []

    def application(run_index: RunIndex, *_: Any) -> None:
        indexes.append(run_index)

    def closed_output(address: str) -> None:
        raise BrokenPipeError(address)

    monkeypatch.setattr(server, "application", application)
    with pytest.raises(BrokenPipeError):
        server.serve(tmp_path, Access(host="127.0.0.1", port=0), started=closed_output)
    (run_index,) = indexes
    assert isinstance(run_index._indexer, subprocess.Popen)
    assert run_index._indexer.poll() is not None


def test_a_program_that_cannot_be_recorded_is_ended_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def noted(*arguments: Any, **keywords: Any) -> subprocess.Popen[bytes]:
        processes.append(popen(*arguments, **keywords))
        return processes[-1]

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(programs.subprocess, "Popen", noted)
    monkeypatch.setattr(programs, "write_program", full)
    config = tiny_config(tmp_path)
    with pytest.raises(LaunchError, match="No space left"):
        programs.start(config, runs_dir=tmp_path / "runs")
    (process,) = processes
    assert process.returncode == -signal.SIGKILL
