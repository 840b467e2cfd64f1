"""A process is known by its number and its start, whatever has been done to the clock since."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest

from harness.runlog.process import identity, is_alive, lives, started_at


def set_clock(monkeypatch: pytest.MonkeyPatch, by_s: float) -> None:
    """What the kernel says of its boot after the wall clock has been set: psutil derives times from that."""
    boot_s = psutil.boot_time()
    monkeypatch.setattr(psutil._psplatform, "boot_time", lambda: boot_s + by_s)


@pytest.mark.parametrize("by_s", [-3600.0, 6.0, 3600.0])
def test_a_clock_that_is_set_ends_no_process(monkeypatch: pytest.MonkeyPatch, by_s: float) -> None:
    here, start_s = identity(), started_at(os.getpid())
    set_clock(monkeypatch, by_s)
    assert is_alive(here)
    assert lives(os.getpid(), start_s)


def test_a_number_that_was_given_again_is_another_process() -> None:
    assert not lives(os.getpid(), started_at(os.getpid()) - 60)
    assert not is_alive({**identity(), "process_start_s": started_at(os.getpid()) + 60})


def test_an_older_log_is_still_understood() -> None:
    here = identity()
    del here["process_start_s"]
    assert is_alive(here)
    assert not is_alive({**here, "process_start": here["process_start"] - 60})


def test_a_zombie_does_not_live() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        start_s = started_at(process.pid)
        assert lives(process.pid, start_s)
        assert process.stdin is not None
        process.stdin.close()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not lives(process.pid, start_s)
