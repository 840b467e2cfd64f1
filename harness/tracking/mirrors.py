"""Starts and ends the side process. Nothing that happens to it reaches the process that started it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import socket
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import psutil

from harness.env import child_environment
from harness.errors import TrackingError
from harness.helper import start_helper
from harness.runlog.paths import side_output_file
from harness.tracking.settings import MirrorSettings

__all__ = ["MirrorHandle", "complete_mirrors", "start_mirrors", "start_sampler"]

logger = logging.getLogger(__name__)

# A side process may outlive its handle; kept here it is reaped without a complaint about that.
_STARTED: list[subprocess.Popen[bytes]] = []
# Where nothing else is set. wandb measures each call for its maker, up to a fifth of what the call costs, and
# its service collects garbage too often and on all cores, for a heap of a few MB.
_SPARING = {"WANDB_ERROR_REPORTING": "false", "GOGC": "400", "GOMAXPROCS": "1"}
_SIDE = "harness.tracking.side"
_GRACE_S = 60.0
"""What starting and ending a process may take on a busy machine."""


def start_mirrors(
    run_dir: str | Path, settings: MirrorSettings | None = None, **changes: Any
) -> MirrorHandle:
    """Starts the side process for a run whose log this process writes. Returns at once, raises nothing.

    Args:
        run_dir: The run; its `RunLog` is already open.
        settings: What to mirror.
        **changes: Fields of `MirrorSettings` that differ from `settings`: `tensorboard=True`,
            `wandb="offline"`.
    """
    settings = dataclasses.replace(settings or MirrorSettings(), **changes)
    try:
        if not settings.node:
            settings.keep(Path(run_dir))
        return MirrorHandle(*_spawn(Path(run_dir).resolve(), settings))
    except OSError as error:
        logger.warning("no mirrors: their process cannot be started (%s); the log is kept", error)
        return MirrorHandle(None, None)


def start_sampler(run_dir: str | Path, settings: MirrorSettings | None = None) -> MirrorHandle:
    """Starts a side process that only samples its node. For one process on each node but that of rank 0."""
    node = socket.gethostname()
    return start_mirrors(
        run_dir, settings, tensorboard=False, wandb="off", picture=False, alerts=(), node=node
    )


def complete_mirrors(
    run_dir: Path, settings: MirrorSettings, *, rebuild: bool, timeout_s: float
) -> dict[str, str | None]:
    """Brings the mirrors of a run that has ended up to its log's end, in a process of their own.

    In this process a library that hangs could not be ended, and one that fails may not start again.

    Returns:
        For each mirror None if it is complete, else what keeps it from that.

    Raises:
        OSError: the process cannot be started.
        TrackingError: it ended too early, or not at all.
    """
    arguments: list[object] = [
        "complete",
        "--run",
        run_dir,
        "--settings",
        settings.to_json(),
        "--timeout",
        timeout_s,
    ]
    arguments += ["--rebuild"] if rebuild else []
    process, messages = _start(arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    repeating = threading.Thread(target=_repeat_messages, args=(messages,), daemon=True)
    repeating.start()
    try:
        said, _ = process.communicate(timeout=timeout_s + _GRACE_S)
    except subprocess.TimeoutExpired:
        said = b""
    finally:
        _end(process)
    repeating.join(_GRACE_S)
    if not said:
        raise TrackingError(
            f"the mirrors of {run_dir} are not complete: their process ended with {process.returncode}",
            rule=f"what it said is in {side_output_file(run_dir)}",
            remedy="try again later; nothing is lost",
        )
    outcome: dict[str, str | None] = orjson.loads(said)
    return outcome


class MirrorHandle:
    """The trainer's end of the side process."""

    def __init__(self, process: subprocess.Popen[bytes] | None, messages: int | None) -> None:
        self._process = process
        if messages is not None:
            threading.Thread(target=_repeat_messages, args=(messages,), daemon=True).start()

    @property
    def pid(self) -> int | None:
        """The side process's number, None if it could not be started."""
        return None if self._process is None else self._process.pid

    def is_alive(self) -> bool:
        """Whether the side process still runs."""
        return self._process is not None and self._process.poll() is None

    def leave(self) -> None:
        """Says that the log is complete, and waits for nothing: the side process finishes by itself."""
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError, ValueError):  # it died, or was told already
                self._process.stdin.write(b"close\n")
                self._process.stdin.close()

    def close(self, timeout_s: float = 30.0) -> bool:
        """Says that the log is complete and waits until the mirrors are; True if they are.

        After `timeout_s` the side process is left to finish by itself.
        """
        if self._process is None:
            return False
        self.leave()
        try:
            return self._process.wait(timeout=timeout_s) == 0
        except subprocess.TimeoutExpired:
            logger.warning(
                "the mirrors are still being completed after %.0f s; this goes on without us", timeout_s
            )
            return False


def _spawn(run_dir: Path, settings: MirrorSettings) -> tuple[subprocess.Popen[bytes], int]:
    trainer = psutil.Process()
    arguments: list[object] = ["follow", "--run", run_dir, "--settings", settings.to_json()]
    arguments += ["--trainer", trainer.pid, "--trainer-start", trainer.create_time()]
    process, messages = _start(arguments, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, yields=True)
    _STARTED.append(process)
    return process, messages


def _start(
    arguments: Sequence[object], *, stdin: int, stdout: int, yields: bool = False
) -> tuple[subprocess.Popen[bytes], int]:
    """The process, and where to read what it has to say to people."""
    messages, messages_out = os.pipe()
    try:
        process = start_helper(
            _SIDE,
            [*arguments, "--messages", messages_out],
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.DEVNULL,
            pass_fds=[messages_out],
            yields=yields,
            environment=child_environment(_SPARING, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1"),
        )
    except OSError:
        os.close(messages)
        raise
    finally:
        os.close(messages_out)
    return process, messages


def _end(process: subprocess.Popen[bytes]) -> None:
    """With what it has started; nothing happens if it has ended already."""
    if process.poll() is None:
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
        process.kill()
    process.communicate()


def _repeat_messages(fd: int) -> None:
    """Says on the trainer's terminal what the side process has to say."""
    with os.fdopen(fd, "r", errors="replace") as lines:
        for line in lines:
            level, _, message = line.rstrip("\n").partition(" ")
            logger.log(int(level) if level.isdecimal() else logging.WARNING, "%s", message)
