"""Which process a record comes from, and whether that process still lives."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from harness import __version__

__all__ = ["identity", "is_alive", "lives", "machine"]

CLOCK_SLACK_S = 5.0


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
    return lives(info.get("pid", -1), info.get("process_start", 0.0))


def lives(pid: int, start: float) -> bool:
    """Whether process `pid`, started at `start` (seconds since the epoch), still runs and is no zombie."""
    try:
        process = psutil.Process(pid)
        # A recycled number belongs to a later process. The start is known through the wall clock, which may
        # have been set since, so it is not compared to the last digit.
        same = abs(process.create_time() - start) < CLOCK_SLACK_S
        return same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, ValueError, OverflowError):  # OverflowError: a number that no process has
        return False
