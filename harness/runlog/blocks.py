"""Where in a log its records lie, block by block, so that a few of them can be read again later.

A block is what one read has brought, or several small ones: a stretch of one segment, some megabytes long.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from harness.files import open_file
from harness.runlog.codec import KINDS, Record, decode
from harness.runlog.scalars import scalars_of
from harness.runlog.segments import Position, segment_name
from harness.runlog.series import Row, Series, joined, series_of
from harness.runlog.timeline import SCALAR_KINDS

__all__ = ["CLOCK", "MADE", "SYSTEM", "Block", "Blocks", "measured"]

MADE = "\0"
"""What the names of metrics begin with that nobody logged as such; those of layers and ranks follow it."""
CLOCK = f"{MADE}clock"
"""Name of the metric that tells which step it was when."""
SYSTEM = -1
"""Stands for the attempt of a node's samples: no rollback replaces them."""
GROW_BYTES = 256 << 10
"""Below this size a block takes in what is read next."""
HELD_BYTES = 64 << 20
"""Blocks kept as arrays after they have been read again, by their size in the log."""
_MEASURED = SCALAR_KINDS | {"layers", "ranks", "rewind", "system"}

_NO_SCALARS = tuple(f'{{"kind":"{kind}"'.encode() for kind in sorted(KINDS - SCALAR_KINDS - {"rewind"}))
"""What the lines of records begin with that hold none, nor say where others belong."""


class Block(NamedTuple):
    """A stretch of a segment."""

    folder: int
    segment: int
    offset: int
    end: int
    attempt: int
    """The newest one at the block's beginning, and its newest step: where records without a step belong."""
    last_step: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.offset


class Blocks:
    """The blocks of a log that have been read so far, numbered in the order of reading.

    Args:
        log: The log's folder.
        within: See `harness.files.open_file`.
    """

    def __init__(self, log: Path, *, within: Path | None = None) -> None:
        self._log = log
        self._within = within
        self.folders: list[str] = []
        self.blocks: list[Block] = []
        self._held: OrderedDict[tuple[Block, bool], dict[tuple[int, str], Series]] = OrderedDict()

    def note(self, folder: str, began: Position, end: Position, last_steps: Mapping[int, int]) -> int:
        """The number of the block that what was read from `began` to `end` belongs to.

        Args:
            last_steps: The newest step of each attempt before it.
        """
        if folder not in self.folders:
            self.folders.append(folder)
        newest = max(last_steps.items(), default=(0, 0))
        block = Block(self.folders.index(folder), began.segment, began.offset, end.offset, *newest)
        if self.blocks:
            last = self.blocks[-1]
            follows = (last.folder, last.segment, last.end) == (block.folder, block.segment, block.offset)
            if follows and last.size < GROW_BYTES:
                self.blocks[-1] = last._replace(end=block.end)
                return len(self.blocks) - 1
        self.blocks.append(block)
        return len(self.blocks) - 1

    def between(self, first: int, last: int) -> Iterable[int]:
        """The blocks from `first` to `last` that lie in the same folder as `first`."""
        folder = self.blocks[first].folder
        return (number for number in range(first, last + 1) if self.blocks[number].folder == folder)

    def size(self, numbers: Iterable[int]) -> int:
        """Bytes of log that `read` would have to decode for these blocks."""
        blocks = (self.blocks[number] for number in numbers)
        return sum(block.size for block in blocks if (block, False) not in self._held)

    def read(self, number: int, *, has_scalars_only: bool = False) -> dict[tuple[int, str], Series]:
        """A block's metrics by attempt and name, in the order of writing; empty if the log is gone.

        Args:
            number: The block's.
            has_scalars_only: Leaves out samples and what is made of layers and ranks, the most of many logs.
        """
        key = self.blocks[number], has_scalars_only
        if key not in self._held:
            self._held[key] = self.decode(number, has_scalars_only=has_scalars_only)
            while sum(block.size for block, _ in self._held) > HELD_BYTES and len(self._held) > 1:
                self._held.popitem(last=False)
        self._held.move_to_end(key)
        return self._held[key]

    def lines(self, number: int) -> list[bytes]:
        """A block's lines; none if the log is gone."""
        block = self.blocks[number]
        path = self._log / self.folders[block.folder] / segment_name(block.segment)
        try:
            with open_file(path, within=self._within) as file:
                file.seek(block.offset)
                return file.read(block.size).split(b"\n")
        except OSError:
            return []

    def decode(self, number: int, *, has_scalars_only: bool = False) -> dict[tuple[int, str], Series]:
        """As `read`, for one who passes by: nothing is kept."""
        left_out = _NO_SCALARS if has_scalars_only else ()
        lines = (line for line in self.lines(number) if not line.startswith(left_out))
        records = [record for record in map(decode, lines) if record is not None]
        block = self.blocks[number]
        parts: dict[tuple[int, str], list[Series]] = {}
        for attempt, metrics in measured(records, {block.attempt: block.last_step}):
            for name, series in metrics.items():
                parts.setdefault((attempt, name), []).append(series)
        return {key: joined(some) for key, some in parts.items()}


def measured(
    records: Sequence[Record], last_steps: dict[int, int]
) -> Iterable[tuple[int, dict[str, Series]]]:
    """What the records measure, and the clock: stretches of one attempt each, in the order of writing.

    Args:
        last_steps: Each attempt's newest step, or where it begins, for records that name none; kept up to
            date.
    """
    for attempt, some in itertools.groupby((r for r in records if r.kind in _MEASURED), key=_attempt):
        rows: list[Row] = []
        ticks: list[Row] = []
        for record in some:
            if record.kind == "rewind":
                last_steps[attempt] = int(record.values["step"])
                continue
            row = _row(record, attempt, last_steps)
            rows.append(row)
            if record.kind in SCALAR_KINDS:
                ticks.append((row[0], row[1], {CLOCK: row[0]}))
        yield attempt, series_of(rows) | series_of(ticks)


def _attempt(record: Record) -> int:
    return SYSTEM if record.kind == "system" else record.attempt


def _row(record: Record, attempt: int, last_steps: dict[int, int]) -> Row:
    if record.kind in SCALAR_KINDS:
        step = record.step if record.step is not None else _newest_step(attempt, last_steps)
        last_steps[attempt] = max(step, last_steps.get(attempt, 0))
        return step, record.time, record.values
    if attempt == SYSTEM:  # dated by its time
        return 0, record.time, record.values
    step = record.step if record.step is not None else _newest_step(attempt, last_steps)
    return step, record.time, {f"{MADE}{name}": value for name, value in scalars_of(record).items()}


def _newest_step(attempt: int, last_steps: Mapping[int, int]) -> int:
    """Where a record without a step belongs: a resumed attempt begins where the one before it was."""
    if attempt in last_steps:
        return last_steps[attempt]
    earlier = max((number for number in last_steps if number < attempt), default=None)
    return 0 if earlier is None else last_steps[earlier]
