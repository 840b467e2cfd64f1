"""Where a run's wall time went: every second of it belongs to one class.

A record of kind `ledger` is the balance since the run's first moment, carried on from attempt to attempt, so
that the newest one is the whole account. It is kept on rank 0, by the host's clock: what a device still has
to do counts where the host waits for it.

| class | what is in it |
|---|---|
| `start` | from a process's begin to its first step, and what its first steps take longer than usual |
| `compute` | steps: forward, backward, update, records and callbacks |
| `data` | waiting for a step's batch |
| `evaluation` | evaluating, callbacks included |
| `checkpoint` | training stands still for a save, or for the last commit |
| `stalled` | what a step takes longer than usual, a hang, and a suspended machine |
| `restart` | from the last sign of a process to the begin of the next one; rolling back |
| `recomputed` | steps that are done again after a restart or a rollback |
| `skipped` | steps that the guard skipped |
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO, Self

from harness.files import open_file
from harness.runlog.codec import Record, decode
from harness.runlog.paths import log_dir
from harness.runlog.segments import segments

__all__ = ["Ledger", "TimeClass", "newest_ledger"]

_MARK = b'{"kind":"ledger"'
_BLOCK_BYTES = 1 << 18
_MOST_SEGMENTS = 8
"""How far back is looked for the newest one: each attempt begins a segment, and soon writes one."""


class TimeClass(StrEnum):
    """What a second was spent on; in the order in which they are shown."""

    COMPUTE = "compute"
    DATA = "data"
    EVALUATION = "evaluation"
    CHECKPOINT = "checkpoint"
    START = "start"
    RESTART = "restart"
    RECOMPUTED = "recomputed"
    SKIPPED = "skipped"
    STALLED = "stalled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """The account of a run up to a moment."""

    seconds: Mapping[TimeClass, float]
    """Of each class, over all attempts."""
    until: float
    """When the account was made, in seconds since the epoch."""
    steps_made: int = 0
    """The number after the highest step that was ever made, on whatever branch."""
    is_finished: bool = False
    """The run was done: what comes before another attempt is nobody's time."""

    @property
    def wall_s(self) -> float:
        """All of the run's time: the sum over the classes."""
        return math.fsum(self.seconds.values())

    @property
    def goodput_frac(self) -> float:
        """The share of the wall time in which steps were made that count: `compute` of all."""
        return self._share(TimeClass.COMPUTE)

    @property
    def ettr_frac(self) -> float:
        """Effective training time ratio: the share that a run without faults, and without checkpoints
        against them, would have needed too; as arXiv:2410.21680 has it."""
        return self._share(TimeClass.COMPUTE, TimeClass.DATA, TimeClass.EVALUATION)

    def to_values(self) -> dict[str, Any]:
        """The values of its record; its time is the record's."""
        seconds = {str(kind): round(spent, 6) for kind, spent in self.seconds.items() if spent}
        return {"seconds": seconds, "steps_made": self.steps_made, "is_finished": self.is_finished}

    @classmethod
    def of(cls, record: Record) -> Self:
        """Read from a record of kind `ledger`, which `soundness` has looked through."""
        said = record.values["seconds"]
        return cls(
            seconds={kind: float(said.get(kind, 0.0)) for kind in TimeClass},
            until=record.time,
            steps_made=record.values["steps_made"],
            is_finished=record.values.get("is_finished") is True,
        )

    def rows(self) -> list[tuple[TimeClass, float, float]]:
        """Class, seconds and share of the wall time, of those that there were."""
        return [(kind, spent, self._share(kind)) for kind, spent in self.seconds.items() if spent]

    def _share(self, *kinds: TimeClass) -> float:
        wall_s = self.wall_s
        return math.fsum(self.seconds[kind] for kind in kinds) / wall_s if wall_s else 0.0


def newest_ledger(run_dir: Path) -> Ledger | None:
    """The account that the log ends with; None if there is none. Reads the end of the log alone.

    Raises:
        OSError: the log cannot be read.
    """
    for path in reversed(segments(log_dir(run_dir))[-_MOST_SEGMENTS:]):
        with open_file(path) as file:
            for line in _from_end(file):
                record = decode(line) if line.startswith(_MARK) else None
                if record is not None:
                    return Ledger.of(record)
    return None


def _from_end(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file, the last one first, without more of it in memory than a block and a line."""
    begin, rest = file.seek(0, os.SEEK_END), b""
    while begin > 0:
        end, begin = begin, max(0, begin - _BLOCK_BYTES)
        file.seek(begin)
        rest, *lines = (file.read(end - begin) + rest).split(b"\n")
        yield from reversed(lines)
    yield rest
