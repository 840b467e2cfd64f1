"""Files of lines that only ever grow: written by one process, followed by any number.

A folder holds `00000000.jsonl`, `00000001.jsonl` and so on. A writer always begins a new segment, so that
nothing that a reader may have seen is ever changed: a line torn by a crash stays at the end of its segment,
without a newline, and is no record. A segment that has a successor is complete.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import time
from collections import deque
from pathlib import Path

from harness.files import list_folder, open_file
from harness.runlog.codec import Record, decode
from harness.runlog.paths import NODES

__all__ = [
    "LONGEST_LINE_BYTES",
    "Follower",
    "Position",
    "SegmentWriter",
    "node_folders",
    "segment_name",
    "segments",
]

logger = logging.getLogger(__name__)

SEGMENT_BYTES = 64 << 20
BACKLOG_BYTES = 64 << 20
"""Lines kept in memory while the disk refuses them."""
RETRY_S = 1.0
READ_BYTES = 1 << 20
LONGEST_LINE_BYTES = 64 << 20
"""What goes on for longer without a newline is no record."""
_SEGMENT = re.compile(r"[0-9]{8,15}\.jsonl")


def segment_name(number: int) -> str:
    """The file of that number."""
    return f"{number:08d}.jsonl"


def segments(folder: Path, *, within: Path | None = None) -> list[Path]:
    """The folder's segments in the order of writing; regular files only.

    Args:
        folder: Of segments; there need be none.
        within: See `harness.files.open_file`.
    """
    names = [name for name in list_folder(folder, within=within).files if _SEGMENT.fullmatch(name)]
    return [folder / name for name in sorted(names, key=lambda name: int(name.partition(".")[0]))]


def node_folders(log: Path, *, within: Path | None = None) -> list[str]:
    """The folders of a log: its own, and those of side processes, which have logs of their own."""
    nodes = list_folder(log / NODES, within=within).folders
    return [".", *(f"{NODES}/{name}" for name in nodes if name.isprintable())]


class SegmentWriter:
    """Appends lines with one unbuffered write each: they survive the writer's death at once.

    A disk that is full or gone raises nothing after the first segment was made: lines wait in memory, the
    writing is tried again every second, and a warning says so.
    """

    def __init__(self, folder: Path, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._retry_at = 0.0
        self.num_lost = 0
        existing = segments(folder)
        self._number = int(existing[-1].stem) if existing else -1
        self._fd, self._size = -1, 0
        self._begin_segment()

    def append(self, line: bytes) -> None:
        """Writes one line that ends in a newline."""
        rest = line if self._waiting else self._write(line)
        if rest:
            self._wait_with(rest)
            if time.monotonic() >= self._retry_at:
                self._write_waiting()

    def sync(self) -> None:
        """Forces everything written so far onto the disk."""
        if self._waiting:
            self._write_waiting()
        try:
            os.fsync(self._fd)
        except OSError as error:
            self._say_stuck(error)

    def close(self) -> None:
        """Writes what waits, once more, and says what is lost if that fails."""
        if self._fd < 0:
            return
        self.sync()
        if self._waiting or self.num_lost:
            lost = self.num_lost + len(self._waiting)
            logger.error("%d records of %s could not be written and are lost", lost, self._folder)
        os.close(self._fd)
        self._fd = -1

    def _write(self, line: bytes) -> bytes:
        """Returns what the disk did not take of the line."""
        try:
            written = os.write(self._fd, line)
        except OSError as error:
            self._say_stuck(error)
            return line
        self._size += written
        if written == len(line) and self._size >= self._segment_bytes:
            self._rotate()
        return line[written:]

    def _rotate(self) -> None:
        try:
            os.fsync(self._fd)
            self._begin_segment()
        except OSError as error:  # the old segment grows on
            self._say_stuck(error)

    def _begin_segment(self) -> None:
        path = self._folder / segment_name(self._number + 1)
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._size, self._number = fd, 0, self._number + 1

    def _wait_with(self, line: bytes) -> None:
        if self._waiting_bytes + len(line) > BACKLOG_BYTES:
            self.num_lost += 1
            return
        self._waiting.append(line)
        self._waiting_bytes += len(line)

    def _write_waiting(self) -> None:
        num_waiting = len(self._waiting)
        while self._waiting:
            line = self._waiting[0]
            rest = self._write(line)
            self._waiting_bytes -= len(line) - len(rest)
            if rest == line:
                return
            if rest:  # the disk took a part: the rest has to follow it directly
                self._waiting[0] = rest
            else:
                self._waiting.popleft()
        self._retry_at = 0.0
        logger.warning("%s takes records again; %d waiting ones were written", self._folder, num_waiting)

    def _say_stuck(self, error: OSError) -> None:
        if not self._retry_at:
            logger.warning(
                "%s takes no records: %s; training goes on, they wait in memory", self._folder, error
            )
        self._retry_at = time.monotonic() + RETRY_S


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Position:
    """Up to where a folder of segments has been read."""

    segment: int = 0
    offset: int = 0
    """Bytes; always the beginning of a line."""


class Follower:
    """Reads complete lines from where it stands; an unfinished last line is left for the next call.

    Args:
        folder: Of segments.
        position: Where to begin.
        within: See `harness.files.open_file`.
    """

    def __init__(self, folder: Path, position: Position = Position(), *, within: Path | None = None) -> None:
        self.folder = folder
        self._within = within
        self.position = position
        self.began = position
        """Where the records that were read last begin."""
        self.num_damaged = 0
        self._listed: deque[Path] = deque()
        """Segments from the position on, as they were when the folder was last looked into."""

    def read(self, max_bytes: int = READ_BYTES) -> list[Record]:
        """The next records, about `max_bytes` of them; none if there is nothing new.

        Raises:
            OSError: the disk fails, or the log has just been removed.
        """
        if not (records := self._read_listed(max_bytes)):
            self._listed = deque(segments(self.folder, within=self._within))
            records = self._read_listed(max_bytes)
        return records

    def _read_listed(self, max_bytes: int) -> list[Record]:
        while self._listed:
            path = self._listed[0]
            number = int(path.stem)
            if number > self.position.segment:
                self.position = Position(number)
            while number == self.position.segment and (lines := self._next_lines(max_bytes)):
                records = [record for record in map(decode, lines) if record is not None]
                self.num_damaged += len(lines) - len(records)
                if records:
                    return records
            self._listed.popleft()
        return []

    def _next_lines(self, max_bytes: int) -> list[bytes]:
        try:
            return self._read_lines(self._listed[0], max_bytes)
        except OSError:
            self._listed.clear()  # it may be gone: the folder is looked into again
            raise

    def _read_lines(self, path: Path, max_bytes: int) -> list[bytes]:
        """The next complete lines of a segment; none at its end."""
        with open_file(path, within=self._within) as file:
            file.seek(self.position.offset)
            data = file.read(max_bytes)
            if data and b"\n" not in data:  # one long line, or a torn one
                data += file.readline(LONGEST_LINE_BYTES)
        is_endless = b"\n" not in data and len(data) > LONGEST_LINE_BYTES
        complete = data if is_endless else data[: data.rfind(b"\n") + 1]
        self.began = self.position
        self.position = dataclasses.replace(self.position, offset=self.position.offset + len(complete))
        return complete.removesuffix(b"\n").split(b"\n") if complete else []
