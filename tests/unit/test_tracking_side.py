"""The side process and its handle: what fails there is not raised to a trainer."""

from __future__ import annotations

import logging
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from harness.helper import start_helper
from harness.tracking import RunLog, mirrors, start_mirrors
from harness.tracking.mirror import MirroredRun
from harness.tracking.settings import MirrorSettings
from tests.support.runs import wait_for
from tests.support.side_process import let_it_take_its_share

QUIET: dict[str, Any] = {"system_every_s": 0.0, "alerts": (), "tensorboard": False}


def test_a_side_process_that_takes_its_trainer_for_dead_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_it_take_its_share(monkeypatch)
    with RunLog(tmp_path):
        handle = start_mirrors(tmp_path, **QUIET)
        first = handle._process
        assert first is not None
        assert first.stdin is not None
        first.stdin.write(b"close\n")  # without `handle` having said it
        first.stdin.flush()
        wait_for(lambda: handle.pid != first.pid, timeout_s=60, what="another process")
        assert first.returncode == 0
        first.stdin.close()
    assert handle.close(60)


@pytest.mark.parametrize("num_started", [0, 1])
def test_no_more_threads_means_no_mirrors_and_no_process(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    num_started: int,
) -> None:
    """The first thread repeats what the process says, the second waits for its end."""
    processes: list[subprocess.Popen[bytes]] = []
    start_thread = threading.Thread.start
    started: list[threading.Thread] = []

    def start(*arguments: Any, **keywords: Any) -> subprocess.Popen[bytes]:
        processes.append(start_helper(*arguments, **keywords))
        return processes[-1]

    def few(thread: threading.Thread) -> None:
        if len(started) == num_started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start_thread(thread)

    monkeypatch.setattr(mirrors, "start_helper", start)
    with RunLog(tmp_path):
        monkeypatch.setattr(threading.Thread, "start", few)
        handle = start_mirrors(tmp_path, **QUIET)
        monkeypatch.undo()
    assert not handle.close(1)
    (process,) = processes
    assert process.returncode is not None
    assert "no mirrors" in caplog.text


def test_a_watcher_that_fails_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("of this test")

    monkeypatch.setattr(mirrors.MirrorHandle, "_begin_again", fail)
    with RunLog(tmp_path):
        handle = start_mirrors(tmp_path, **QUIET)
        process = handle._process
        assert process is not None
        process.kill()
        assert handle._over.wait(30)
    handle.close(1)


def test_mirrors_that_ask_at_once_get_one_id(tmp_path: Path) -> None:
    for attempt in range(20):
        run = MirroredRun(tmp_path / str(attempt), MirrorSettings())
        ids, ready = list[str](), threading.Barrier(8)

        def ask(run: MirroredRun = run, ids: list[str] = ids, ready: threading.Barrier = ready) -> None:
            ready.wait()
            ids.append(run.id)

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(ids) == 8
        assert len(set(ids)) == 1
        assert len(ids[0]) == 12
