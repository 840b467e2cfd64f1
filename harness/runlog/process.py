"""Which process a record comes from, and whether that process still lives."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from harness import __version__

__all__ = ["age_s", "identity", "is_alive", "lives", "machine", "started_at"]

CLOCK_SLACK_S = 5.0
"""The kernel's clock is read twice for a time since boot, and rounds the boot to a second."""


@functools.cache
def machine() -> str:
    """Names the kernel and the PID namespace in which this process's number means something."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    return socket.gethostname()


def identity() -> dict[str, Any]:
    """What the `run` record of an attempt says about its process."""
    return {
        "pid": os.getpid(),
        "process_start": psutil.Process().create_time(),
        "process_start_s": started_at(os.getpid()),
        "machine": machine(),
        "host": socket.gethostname(),
        "command": list(sys.argv),
        "python": platform.python_version(),
        "harness": __version__,
    }


def is_alive(info: Mapping[str, Any]) -> bool | None:
    """Whether the process of an `identity` still runs; None if it belongs to another machine."""
    if info.get("machine") != machine():
        return None
    start_s = info.get("process_start_s")
    if start_s is None:  # written before 0.2, by the wall clock alone
        start_s = info.get("process_start", 0.0) - psutil.boot_time()
    return lives(info.get("pid", -1), start_s)


def started_at(pid: int) -> float:
    """When a process began, in seconds since the machine's boot, which no setting of the clock changes.

    Raises:
        psutil.Error: there is no such process.
    """
    # The kernel knows the ticks since boot, psutil adds the boot by the wall clock as it is set now.
    process = psutil.Process(pid)
    return process.create_time() - psutil.boot_time()


def age_s() -> float:
    """How long ago this process was started."""
    if not hasattr(time, "CLOCK_BOOTTIME"):
        return time.time() - psutil.Process().create_time()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_at(os.getpid())


def lives(pid: int, start_s: float) -> bool:
    """Whether process `pid`, whose `started_at` is `start_s`, still runs and is no zombie."""
    try:
        same = abs(started_at(pid) - start_s) < CLOCK_SLACK_S  # a recycled number belongs to a later process
        return same and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, ValueError, OverflowError):  # OverflowError: a number that no process has
        return False
