"""A first look at a log that is too long to be read at once: a few records from many places of it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from harness.files import open_file
from harness.runlog.codec import Record, decode
from harness.runlog.digest import Digest
from harness.runlog.digest_cache import load_digest
from harness.runlog.log_follower import folder_sizes
from harness.runlog.paths import log_dir
from harness.runlog.reader import is_run, no_run, unreadable
from harness.runlog.segments import LONGEST_LINE_BYTES, READ_BYTES, node_folders
from harness.runlog.traces import Entries

__all__ = ["LONG_BYTES", "open_digest", "open_whole", "preview"]

LONG_BYTES = 32 << 20
"""So much of a log is read while somebody waits."""
NUM_PLACES = 600
LINES_PER_PLACE = 3
HEAD_LINES = 20
"""At the beginning of each segment: that is where an attempt says what it is."""
TAIL_BYTES = 256 << 10
MOST_BYTES = 16 << 20
"""Of lines that are kept, the newest ones aside; lines that are too long for it are passed over."""


def preview(
    run_dir: str | Path,
    *,
    num_places: int = NUM_PLACES,
    tail_bytes: int = TAIL_BYTES,
    within: Path | None = None,
) -> Digest:
    """A digest of records from evenly spaced places, and of the newest ones; takes a fraction of a second.

    Spikes and events between those places are missing: `is_preview` says so.

    Args:
        num_places: From how many places between the first records and the newest.
        tail_bytes: How much of the log's end is read.
        within: See `harness.files.open_file`.
    """
    return _Preview(run_dir, num_places, tail_bytes, within)


def open_digest(run_dir: str | Path, *, cached: Path | None = None, within: Path | None = None) -> Digest:
    """The run's digest, read to the end of its log; of a log with more than `LONG_BYTES` to read a preview.

    Args:
        cached: File in which an earlier reading may have been saved; see `digest_cache.save_digest`.
        within: See `harness.files.open_file`.
    """
    earlier = load_digest(Path(run_dir), cached, within=within) if cached is not None else None
    digest = earlier or Digest(run_dir, within=within)
    if digest.bytes_behind() > LONG_BYTES:
        return preview(run_dir, within=within)
    digest.refresh()
    return digest


def open_whole(run_dir: str | Path) -> Digest:
    """The run's digest, read to the end of its log however long that takes.

    Raises:
        TrackingError: there is no log in it, or it cannot be read.
    """
    digest = Digest(run_dir)
    try:
        if not is_run(run_dir):
            raise no_run(run_dir)
        digest.refresh()
    except OSError as error:
        raise unreadable(run_dir, error) from error
    return digest


class _Preview(Digest):
    is_preview = True

    def __init__(self, run_dir: str | Path, num_places: int, tail_bytes: int, within: Path | None) -> None:
        super().__init__(run_dir, within=within)
        self._restarted: set[int] = set()
        """Attempts that a new process began."""
        records: list[Record] = []
        num_bytes = total = 0
        log = log_dir(run_dir)
        folders = [folder_sizes(log / name, within=within) for name in node_folders(log, within=within)]
        share = MOST_BYTES // max(1, sum(map(len, folders)))
        for parts in folders:
            whole = sum(size for _, size in parts)
            total += whole
            for path, size in parts:
                is_last = path == parts[-1][0]
                every = max(1, whole // num_places if num_places else size)
                end = size - tail_bytes if is_last else size
                for line in self._lines(path, every=every, middle_ends=end, has_tail=is_last, most=share):
                    num_bytes += len(line)
                    record = decode(line)
                    if record is not None:
                        records.append(record)
        self._take(records, block=0)
        self.num_bytes = self._size()
        self.read_frac = min(0.999, num_bytes / max(1, total))

    def refresh(self, *, budget_s: float | None = None) -> bool:
        """What was read stays as it is."""
        return True

    def bytes_behind(self) -> int:
        """Nothing more is going to be read."""
        return 0

    def _note(self, record: Record) -> None:
        """A rollback's `rewind` may lie between two places: it begins at its first step seen then."""
        super()._note(record)
        if record.kind == "run":
            self._restarted.add(record.attempt)
        elif record.kind == "step" and record.step is not None and self._is_from_rollback(record.attempt):
            self._begins_at(record.attempt, record.step)

    def _is_from_rollback(self, attempt: int) -> bool:
        is_known = attempt in self._restarted or attempt in self._first_steps
        return not is_known and attempt > min(self.attempt_starts)

    def _is_near(self, entries: Entries) -> bool:
        return False  # where the records lie is not kept

    def _lines(
        self, path: Path, *, every: int, middle_ends: int, has_tail: bool, most: int
    ) -> Iterator[bytes]:
        """Whole lines of a segment: the first ones, some at each place, and all after the middle's end.

        Of `most` bytes those before the end half is for the first ones, the other half for the places alike.
        """
        with contextlib.suppress(OSError), open_file(path, within=self.within) as file:
            yield from _some(file, HEAD_LINES, max(most // 2, TAIL_BYTES if has_tail else 0))
            taken = 0
            for place in range(every, middle_ends, every):
                if place > file.tell():
                    file.seek(place)
                    _skip_line(file)
                    if file.tell() < middle_ends:
                        for line in _some(file, LINES_PER_PLACE, most // 2 * place // middle_ends - taken):
                            taken += len(line)
                            yield line
            if has_tail:
                if middle_ends > file.tell():
                    file.seek(middle_ends)
                    _skip_line(file)
                yield from _some(file, sys.maxsize, LONGEST_LINE_BYTES)


def _some(file: BinaryIO, num_lines: int, num_bytes: int) -> Iterator[bytes]:
    """So many whole lines at most, of so many bytes together; leaves the file at a line's beginning."""
    for _ in range(num_lines):
        line = file.readline(max(0, num_bytes))
        if not line.endswith(b"\n"):
            _skip_line(file)
            return
        num_bytes -= len(line)
        yield line


def _skip_line(file: BinaryIO) -> None:
    while part := file.readline(READ_BYTES):
        if part.endswith(b"\n"):
            return
