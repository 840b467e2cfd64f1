"""The launcher that started this process: it may die, and it may try again what cannot succeed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

from harness import env
from harness.atomic import write_atomically

__all__ = [
    "RENDEZVOUS_SETTINGS",
    "clear_exit_note",
    "end_launcher",
    "leave_exit_note",
    "missing_settings",
    "stop_with_launcher",
]

_PR_SET_PDEATHSIG = 1  # from linux/prctl.h
RENDEZVOUS_SETTINGS = "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=10"
_LAUNCHERS = (
    b"torchrun",
    b"harness.agent",
    b"harness/agent.py",
    b"torch.distributed.run",
    b"torch/distributed/run.py",
    b"accelerate",
)


def stop_with_launcher() -> None:
    """Asks Linux for a SIGTERM when the launcher dies; elsewhere, and without a launcher, does nothing.

    What counts for Linux is the end of the thread that started this process (prctl(2)): the main thread of
    torchrun and accelerate, and one to be kept by a launcher of somebody's own.

    To be called first thing, and after SIGTERM is handled: a launcher that is dead already sends no signal,
    so this process asks itself to stop then.
    """
    if sys.platform != "linux" or not env.has_launcher():
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() == 1 and env.is_direct_child() and not _is_launcher(1):
        os.kill(os.getpid(), signal.SIGTERM)


def end_launcher(*, speaks: bool) -> None:
    """Ends torchrun's agent, which would start a program again whatever its exit code says.

    It has no other way of being told (https://github.com/pytorch/pytorch/issues/133877). Every process calls
    this last thing, and does nothing without an agent that would try again.

    Args:
        speaks: Whether it is this process, one of each machine, that tells the agent; a second signal would
            disturb the agent's end.
    """
    parent = os.getppid()
    if not env.restarts_left() or not _is_launcher(parent):
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which the agent will send to its children
    if speaks:
        with contextlib.suppress(OSError):
            os.kill(parent, signal.SIGTERM)


def leave_exit_note(exit_code: int) -> None:
    """Leaves the exit code where the launcher asks for it."""
    note = env.exit_note()
    if note is not None:
        with contextlib.suppress(OSError):  # the launcher is gone, and its folder
            write_atomically(note, str(exit_code))


def clear_exit_note() -> None:
    """Forgets the exit code of an earlier attempt; by every process, first thing."""
    note = env.exit_note()
    if note is not None:
        with contextlib.suppress(OSError):
            note.unlink()


def missing_settings() -> list[str]:
    """What torchrun's agents on several machines lack to lose a machine and take it in again; what an agent
    was started with is seen where it is this process's parent."""
    if not env.is_restartable_on_several():
        return []
    missing = ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"] if env.shares_agent_store() else []
    command = _command(os.getppid())
    if (
        _is_launcher(os.getppid())
        and b"keep_alive_interval" not in command + env.rendezvous_settings().encode()
    ):
        missing.append(f"--rdzv-conf {RENDEZVOUS_SETTINGS}")
    return missing


def _is_launcher(pid: int) -> bool:
    return any(name in _command(pid) for name in _LAUNCHERS)


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
