"""Follows a whole log, its own folder and those of side processes, and knows it again."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from harness.files import file_status, open_file
from harness.runlog.paths import log_dir
from harness.runlog.segments import Follower, Position, node_folders, segment_name, segments

__all__ = ["LogFollower", "folder_sizes", "log_signature"]

HEAD_BYTES = 1024


class LogFollower:
    """Where each folder of a run's log has been read up to.

    Args:
        run_dir: The run's directory; there need be no log in it yet.
        within: A folder below which no link is followed; None: links are.

    Attributes:
        head: The beginning of the log, by which it is known; empty before anything is there.
    """

    def __init__(self, run_dir: Path, *, within: Path | None = None) -> None:
        self._log = log_dir(run_dir)
        self._within = within
        self._followers: dict[str, Follower] = {}
        self.head = b""

    @property
    def num_damaged(self) -> int:
        """Complete lines that are no records; a healthy log has none."""
        return sum(follower.num_damaged for follower in self._followers.values())

    def followers(self) -> Iterator[tuple[str, Follower]]:
        """A follower for each folder that is there now, by name."""
        for folder in node_folders(self._log, within=self._within):
            yield folder, self._followers.setdefault(folder, self._made(folder, Position()))

    def positions(self) -> dict[str, Position]:
        """Up to where each folder has been read."""
        return {folder: follower.position for folder, follower in self._followers.items()}

    def is_same_log(self) -> bool:
        """Whether the log is the one that was read, and as long at least: a run may have been deleted and
        another begun under its name, and a log may have been cut short."""
        head = self._read_head()
        if not head.startswith(self.head) or not self._reaches(self.positions()):
            return False
        if len(self.head) < HEAD_BYTES:
            self.head = head
        return True

    def dump(self) -> dict[str, tuple[int, int, int]]:
        """Segment, offset in bytes and number of damaged lines for each folder; `restore` takes them back."""
        return {
            folder: (follower.position.segment, follower.position.offset, follower.num_damaged)
            for folder, follower in self._followers.items()
        }

    def restore(self, head: bytes, places: Mapping[str, tuple[int, int, int]]) -> bool:
        """Takes back what `dump` gave of the log with that head; False if it is another one, or shorter."""
        positions = {folder: Position(segment, offset) for folder, (segment, offset, _) in places.items()}
        self.head = head
        if not self._read_head().startswith(head) or not self._reaches(positions):
            return False
        for folder, position in positions.items():
            self._followers[folder] = self._made(folder, position)
            self._followers[folder].num_damaged = places[folder][2]
        return True

    def sizes(self) -> Iterator[tuple[int, int]]:
        """Bytes of every segment, and how many of them are still to be read."""
        for folder in node_folders(self._log, within=self._within):
            place = self._followers[folder].position if folder in self._followers else Position()
            for path, size in folder_sizes(self._log / folder, within=self._within):
                number = int(path.stem)
                read = size if number < place.segment else place.offset if number == place.segment else 0
                yield size, max(0, size - read)

    def read_frac(self) -> float:
        """How much of the log has been read."""
        sizes = list(self.sizes())
        return 1.0 - sum(unread for _, unread in sizes) / max(1, sum(size for size, _ in sizes))

    def _made(self, folder: str, position: Position) -> Follower:
        return Follower(self._log / folder, position, within=self._within)

    def _reaches(self, positions: Mapping[str, Position]) -> bool:
        """Whether the log goes up to there; asks for one file's size in each folder."""
        for folder, position in positions.items():
            size = 0
            with contextlib.suppress(OSError):
                path = self._log / folder / segment_name(position.segment)
                size = file_status(path, within=self._within).st_size
            if size < position.offset:
                return False
        return True

    def _read_head(self) -> bytes:
        for path in segments(self._log, within=self._within)[:1]:
            with contextlib.suppress(OSError), open_file(path, within=self._within) as file:
                return file.read(HEAD_BYTES)
        return b""


def folder_sizes(folder: Path, *, within: Path | None = None) -> list[tuple[Path, int]]:
    """The segments of a folder and their sizes in bytes."""
    paths = segments(folder, within=within)
    return [(path, file_status(path, within=within).st_size) for path in paths]


def log_signature(run_dir: Path, *, within: Path | None = None) -> tuple[str, int]:
    """Something that changes whenever the log grows, and how many bytes it has."""
    log = log_dir(run_dir)
    files = [
        (str(path), file_status(path, within=within))
        for folder in node_folders(log, within=within)
        for path in segments(log / folder, within=within)
    ]
    known_by = repr([(name, status.st_size, status.st_mtime_ns) for name, status in files])
    num_bytes = sum(status.st_size for _, status in files)
    return hashlib.sha256(known_by.encode(errors="surrogateescape")).hexdigest()[:32], num_bytes
