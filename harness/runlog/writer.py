"""The run's log, written by rank 0: the truth of which everything else is a mirror."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from harness.errors import TrackingError
from harness.locks import LockHeldError, ProcessLock
from harness.runlog.codec import KINDS, decode, encode
from harness.runlog.paths import log_dir, writer_lock
from harness.runlog.process import identity
from harness.runlog.segments import SEGMENT_BYTES, SegmentWriter, segments
from harness.runlog.soundness import LAST_ATTEMPT, checked_step

__all__ = ["RunLog"]

logger = logging.getLogger(__name__)

_PAUSE_S = 0.2


class RunLog:
    """Appends records to the log under `run_dir`. A record is in the kernel's hands when `write` returns.

    Opening begins a new attempt, numbered from what the log holds. After that nothing here raises for the
    disk's sake: what cannot be written waits in memory (`SegmentWriter`). Never synchronises with a device
    unless a value is a tensor on one. Safe to use from several threads.

    Args:
        run_dir: The run's directory; made if need be.
        info: What to note about this attempt beside process, host and time.
        segment_bytes: Size at which a new file is begun.
        wait_s: How long another process, which is about to end, may still write this log.

    Raises:
        TrackingError: another process writes this log, the directory cannot be written, or the log holds
            an attempt with a number that is too high to be followed by others.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        info: Mapping[str, Any] | None = None,
        segment_bytes: int = SEGMENT_BYTES,
        wait_s: float = 0.0,
    ) -> None:
        self.run_dir = Path(run_dir).absolute()
        self._folder = log_dir(self.run_dir)
        self._mutex = threading.Lock()
        self._ended = self._closed = False
        self._has_steps = False
        with _explained(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = _writer_lock(self.run_dir, wait_s)
            try:
                self.attempt = _next_attempt(self._folder)
                self._segments = SegmentWriter(self._folder, segment_bytes=segment_bytes)
            except (OSError, TrackingError):
                self._lock.release()
                raise
        self.write("run", {**identity(), **(info or {})})

    def write(self, kind: str, values: Mapping[str, Any], *, step: int | None = None) -> None:
        """Appends one record.

        Args:
            kind: One of `codec.KINDS`.
            values: Names and values; NaN and infinities are kept.
            step: Number of the step, counted from 0. Written again in the same attempt, the later value of
                a name holds.

        Raises:
            TrackingError: an unknown kind, a negative step, or a value that a log cannot hold.
        """
        if kind not in KINDS:
            raise TrackingError(f"the record's kind is {kind!r}", rule=f"it is one of {sorted(KINDS)}")
        if step is not None:
            step = checked_step(step)
        with self._mutex:
            self._append(kind, values, step)

    def rewind(self, step: int) -> None:
        """Says that `step` is the next one written: what was logged for it and later ones is abandoned.

        After a rollback this begins a new attempt; right after a restart it only marks where the attempt
        begins. Readers show the abandoned records on request.
        """
        step = checked_step(step)
        with self._mutex:
            if self._has_steps:
                self.attempt += 1
            self._append("rewind", {"step": step}, None)
            self._has_steps = False

    def end(self, state: str, values: Mapping[str, Any] | None = None) -> None:
        """Notes how the attempt ended: `finished`, `stopped`, `unstable` or `crashed`. The first holds."""
        if not self._ended:
            self.write("end", {"state": state, **(values or {})})

    def sync(self) -> None:
        """Forces the log onto the disk; some milliseconds. For checkpoints, not for every step."""
        with self._mutex:
            self._segments.sync()

    def close(self, state: str = "finished") -> None:
        """Notes the end if `end` was not called, and lets go of the log. Idempotent."""
        if self._closed:
            return
        self.end(state)
        self._closed = True
        with self._mutex:
            self._segments.close()
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close("finished")
        else:
            self.close("stopped" if issubclass(kind, KeyboardInterrupt) else "crashed")

    def _append(self, kind: str, values: Mapping[str, Any], step: int | None) -> None:
        if self._closed:
            raise TrackingError(
                f"the log {self._folder} is closed", rule="records are written before close()"
            )
        self._segments.append(encode(kind, values, attempt=self.attempt, step=step, time=time.time()))
        self._has_steps = self._has_steps or step is not None
        self._ended = self._ended or kind == "end"


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrackingError(
            f"the log {folder} cannot be written: {error.strerror}",
            rule="a run needs a directory that it may write to",
            remedy="choose another folder for runs, or mend its permissions",
        ) from error


def _next_attempt(folder: Path) -> int:
    """The number of the attempt that begins now; far from the last one that a reader takes for sound."""
    attempt = _last_attempt(folder) + 1
    if attempt > LAST_ATTEMPT // 2:
        raise TrackingError(
            f"the newest attempt in the log {folder} is {attempt - 1}",
            rule=f"attempts are counted from 0, and a new one is at most {LAST_ATTEMPT // 2}",
            remedy="remove the line that another program wrote at its end, or give this run another name",
        )
    return attempt


def _last_attempt(folder: Path) -> int:
    """The newest attempt that the log tells of, or -1. A torn last line is passed over."""
    for path in reversed(segments(folder)):
        for line in reversed(path.read_bytes().split(b"\n")):
            record = decode(line)
            if record is not None:
                return record.attempt
    return -1


def _writer_lock(run_dir: Path, wait_s: float) -> ProcessLock:
    ends, has_warned = time.monotonic() + wait_s, False
    while True:
        try:
            return ProcessLock(writer_lock(run_dir))
        except LockHeldError as held:
            if time.monotonic() > ends:
                error = TrackingError(
                    f"the log {log_dir(run_dir)} is being written by {held}",
                    rule="a run has one writer",
                    remedy="stop the other one, or give this run another name",
                )
                error.restart_may_help = (
                    wait_s > 0
                )  # two parts of a job that lost sight of each other may meet
                raise error from None
            if not has_warned:
                logger.warning("waiting for the end of %s, which writes this run's log", held)
                has_warned = True
        time.sleep(_PAUSE_S)
