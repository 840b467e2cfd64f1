"""Which file and offset each byte of a prepared text comes from.

Two files beside the text: `.pieces`, a row of int64 for each piece of a file (end in the text, offset in the
file, where the path begins), and `.paths`, the paths, each followed by a 0 byte. Both are searched where they
are, whatever their length. The last byte of a piece in the text is the separator, which is in no file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["Origin"]

_SOURCE = re.compile(r"(.+?):([0-9]{1,18})(?:, .*)?", re.DOTALL)
_END, _OFFSET, _PATH = range(3)
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Origin:
    """Of the text `stem`.bin."""

    stem: Path

    def write(self, pieces: Sequence[tuple[str, int, int]]) -> None:
        """Writes both files.

        Args:
            pieces: In the order of the text: a file, an offset in it, and for how many bytes of the text.

        Raises:
            OSError: the disk is full, gone or read-only.
        """
        paths = [os.fsencode(path) + b"\0" for path, _, _ in pieces]
        table = np.zeros((len(pieces), 3), dtype=np.int64)
        table[:, _END] = np.cumsum([num_bytes for _, _, num_bytes in pieces])
        table[:, _OFFSET] = [offset for _, offset, _ in pieces]
        table[:, _PATH] = np.cumsum([0, *map(len, paths)])[:-1]
        for suffix, content in ((".pieces", table.tobytes()), (".paths", b"".join(paths))):
            with open(self.stem.with_suffix(suffix), "wb") as out:
                out.write(content)
                out.flush()
                os.fsync(out.fileno())

    def describe(self, start: int, stop: int) -> str:
        """`FILE:OFFSET` of the byte at `start` of the text, and of each further piece that begins before
        `stop`; of a separator that of the piece behind it."""
        table = self._table()
        ends, most = table[:, _END], len(table) - 1
        first = min(int(np.searchsorted(ends, start, side="right")), most)
        if first < most and ends[first] == start + 1:
            first, start = first + 1, start + 1
        last = min(int(np.searchsorted(ends, max(start, stop - 1), side="right")), most)
        shown = [
            self._place(table, number, max(start, self._start(table, number)))
            for number in range(first, min(last, first + _SHOWN - 1) + 1)
        ]
        more = [f"and {last - first + 1 - _SHOWN} more"] if last - first >= _SHOWN else []
        return ", ".join([*shown, *more])

    def find(self, sources: Collection[str]) -> dict[str, int]:
        """Where the bytes `FILE:OFFSET`, as `describe` gives them, stand in the text, of those in it;
        of several such places the first. Goes through the pieces once."""
        wanted: dict[bytes, list[tuple[str, int]]] = {}
        for source in sources:
            if (match := _SOURCE.fullmatch(source)) is not None:
                wanted.setdefault(os.fsencode(match[1]), []).append((source, int(match[2])))
        found: dict[str, int] = {}
        paths, start = self.stem.with_suffix(".paths").read_bytes(), 0
        for end, first, place in self._table().tolist():
            for source, offset in wanted.get(paths[place : paths.index(b"\0", place)], ()):
                if first <= offset < first + end - 1 - start:
                    found.setdefault(source, start + offset - first)
            start = end
        return found

    def _table(self) -> NDArray[np.int64]:
        return np.memmap(self.stem.with_suffix(".pieces"), dtype=np.int64, mode="r").reshape(-1, 3)

    def _start(self, table: NDArray[np.int64], number: int) -> int:
        return int(table[number - 1, _END]) if number else 0

    def _place(self, table: NDArray[np.int64], number: int, place: int) -> str:
        with open(self.stem.with_suffix(".paths"), "rb") as file:
            file.seek(int(table[number, _PATH]))
            path = file.read(os.pathconf("/", "PC_PATH_MAX") + 1).partition(b"\0")[0]
        return f"{os.fsdecode(path)}:{int(table[number, _OFFSET]) + place - self._start(table, number)}"
