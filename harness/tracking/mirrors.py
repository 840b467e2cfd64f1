"""Starts the side process, watches it, and ends it. Nothing that happens to it reaches who started it."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import orjson
import psutil

from harness.env import child_environment
from harness.errors import TrackingError
from harness.helper import start_helper
from harness.runlog.paths import side_output_file
from harness.runlog.process import started_at
from harness.tracking.settings import MirrorSettings

__all__ = ["MirrorHandle", "complete_mirrors", "start_mirrors", "start_sampler"]

logger = logging.getLogger(__name__)

# Where nothing else is set. wandb measures each call for its maker, up to a fifth of what the call costs, and
# its service collects garbage too often and on all cores, for a heap of a few MB.
_SPARING = {"WANDB_ERROR_REPORTING": "false", "GOGC": "400", "GOMAXPROCS": "1"}
_SIDE = "harness.tracking.side"
_GRACE_S = 60.0
"""What starting and ending a process may take on a busy machine."""
LAST_WORDS_S = 5.0
MOST_ENDS = 3
MOST_ENDS_IN_S = 600.0
"""A side process that has ended so often in that time is not started again."""


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
    with contextlib.suppress(OSError):  # the disk is full: then its own words are better than ours
        settings.keep(Path(run_dir))
    return MirrorHandle(_following("follow", Path(run_dir), settings))


def start_sampler(run_dir: str | Path, settings: MirrorSettings | None = None) -> MirrorHandle:
    """Starts a side process that only samples its node. For one process on each node but that of rank 0."""
    node = ["--node", socket.gethostname()]
    return MirrorHandle(_following("sample", Path(run_dir), settings or MirrorSettings(), *node))


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
    arguments = ["--timeout", timeout_s, *(["--rebuild"] if rebuild else [])]
    process, repeating = _start(
        "complete", run_dir, settings, arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
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
    """The trainer's end of the side process.

    A thread waits for the process to end. One that was killed is started again and goes on where it was: its
    mirrors lack nothing. The training thread has no part in that.

    Args:
        start: Starts the process; None if there is none.
    """

    def __init__(self, start: Callable[[], _Started] | None) -> None:
        self._start = start
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._is_complete = self._is_left = False
        self._over = threading.Event()
        """Set when nothing will be started again."""
        messages = self._begin()
        if messages is None:
            self._over.set()
            return
        try:
            threading.Thread(target=self._watch, args=(messages,), daemon=True).start()
        except RuntimeError as error:
            self._give_up(error)

    @property
    def pid(self) -> int | None:
        """The side process's number, None if it could not be started."""
        return None if self._process is None else self._process.pid

    def is_alive(self) -> bool:
        """Whether the side process still runs."""
        return self._process is not None and self._process.poll() is None

    def leave(self) -> None:
        """Says that the log is complete, and waits for nothing: the side process finishes by itself."""
        with self._lock:
            self._is_complete = True
            self._tell()

    def close(self, timeout_s: float = 30.0) -> bool:
        """Says that the log is complete and waits until the mirrors are; True if they are.

        After `timeout_s` the side process is left to finish by itself.
        """
        self.leave()
        if not self._over.wait(timeout_s):
            with self._lock:
                self._is_left = True
            logger.warning(
                "the mirrors are still being completed after %.0f s; this goes on without us", timeout_s
            )
            return False
        return self._process is not None and self._process.poll() == 0

    def _begin(self) -> threading.Thread | None:
        """Starts the process; gives the thread that repeats what it says, None if there is no process."""
        if self._start is None:
            return None
        try:
            self._process, messages = self._start()
        except (OSError, psutil.Error) as error:
            logger.warning("no mirrors: their process cannot be started (%s); the log is kept", error)
            return None
        return messages

    def _give_up(self, error: Exception) -> None:
        logger.warning("no mirrors: their process cannot be watched (%s); the log is kept", error)
        if self._process is not None:
            _end(self._process)
        self._over.set()

    def _tell(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError, ValueError):  # it died, or was told already
                self._process.stdin.write(b"close\n")
                self._process.stdin.close()

    def _close_stdin(self) -> None:
        """Of a process that has ended, which another one may replace."""
        with self._lock, contextlib.suppress(OSError):
            if self._process is not None and self._process.stdin is not None:
                self._process.stdin.close()

    def _watch(self, messages: threading.Thread | None) -> None:
        ends: list[float] = []
        try:
            while messages is not None and self._process is not None:
                exit_code = self._process.wait()
                messages.join(LAST_WORDS_S)
                self._close_stdin()
                if exit_code == 0 and self._is_complete:  # before that it has taken this process for dead
                    break
                now = time.monotonic()
                ends = [*(end for end in ends if now - end < MOST_ENDS_IN_S), now]
                messages = self._begin_again(exit_code, is_hopeless=len(ends) >= MOST_ENDS)
        finally:
            self._over.set()

    def _begin_again(self, exit_code: int, *, is_hopeless: bool) -> threading.Thread | None:
        with self._lock:
            if self._is_left:
                return None
            if is_hopeless:
                logger.warning(
                    "no mirrors any more: their process ended %d times, at last with %d; "
                    "the log is kept, and `harness sync` makes them from it",
                    MOST_ENDS,
                    exit_code,
                )
                return None
            messages = self._begin()
            if self._is_complete:
                self._tell()
        return messages


_Started = tuple["subprocess.Popen[bytes]", threading.Thread]


def _following(
    task: str, run_dir: Path, settings: MirrorSettings, *arguments: object
) -> Callable[[], _Started]:
    def start() -> _Started:
        trainer = os.getpid()
        given = ["--trainer", trainer, "--trainer-start", started_at(trainer), *arguments]
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL}
        return _start(task, run_dir.resolve(), settings, given, **streams, yields=True)

    return start


def _start(
    task: str,
    run_dir: Path,
    settings: MirrorSettings,
    arguments: Sequence[object],
    *,
    stdin: int,
    stdout: int,
    yields: bool = False,
) -> _Started:
    """The process, and the thread that repeats what it has to say to people.

    Raises:
        OSError: one of them cannot be started.
    """
    messages, messages_out = os.pipe()
    given = ["--run", run_dir, "--settings", settings.to_json(), "--messages", messages_out, *arguments]
    if settings.mirrors:  # found where this process finds modules, and from the current directory
        given += ["--path", os.pathsep.join(["", *sys.path])]
    try:
        process = start_helper(
            _SIDE,
            [task, *given],
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
    repeating = threading.Thread(target=_repeat_messages, args=(messages,), daemon=True)
    try:
        repeating.start()
    except RuntimeError as error:
        os.close(messages)
        _end(process)
        raise OSError(errno.EAGAIN, str(error)) from error
    return process, repeating


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
