"""Which documents stand together in a row of fixed length.

A row is a list of segments, stretches of one document each. The targets of a segment's inputs are the tokens
that follow each of them in the same document, so the last token of a document is a target only.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from harness.data.alive import still_working
from harness.data.prepared import prepared_folder, sync_file
from harness.data.split import val_limit
from harness.errors import DataError
from harness.tasks.hf.settings import Packing
from harness.tasks.hf.store import TokenStore

__all__ = ["Rows", "Segment", "pack", "prepare_rows"]

Segment = tuple[int, int]
"""First token in the store, number of inputs."""

_OPEN_ROWS = 64
"""Rows that are filled at once; more would pack a little closer, and need the documents shuffled less."""
_PARTS = ("train", "val")


class Rows:
    """The segments of each row, mapped from disk."""

    def __init__(self, folder: Path, part: str) -> None:
        self._segments = self._map(folder / f"{part}-segments.bin").reshape(-1, 2)
        self._ends = self._map(folder / f"{part}-ends.bin")

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: int) -> NDArray[np.int64]:
        """`[segments, 2]`: first token and number of inputs of each."""
        start = 0 if row == 0 else self._ends[row - 1]
        return self._segments[start : self._ends[row]]

    @staticmethod
    def _map(path: Path) -> NDArray[np.int64]:
        if path.stat().st_size == 0:  # which cannot be mapped
            return np.zeros(0, dtype=np.int64)
        return np.memmap(path, dtype=np.int64, mode="r")


def prepare_rows(
    store: TokenStore, *, length: int, packing: Packing, use: str, val_frac: float
) -> tuple[Rows, Rows]:
    """The training and the validation rows of a source, kept beside its tokens; one may have none.

    Args:
        length: Inputs of a row.
        use: `split`: hold out `val_frac` of the documents by the hash of their content; `train`, `val`: all
            documents are for that.

    Raises:
        DataError: there is nothing to tell documents apart by.
    """
    described = json.dumps([2, length, packing, use, val_frac])
    folder = store.folder.with_name(
        f"{store.folder.name}-rows-{xxhash.xxh3_64_hexdigest(described.encode())}"
    )

    def build(unfinished: Path) -> None:
        held_out = _held_out(store.ranks, use, val_frac)
        for part, chosen in zip(_PARTS, (~held_out, held_out), strict=True):
            _write(unfinished, part, _rows(store, chosen, length, packing))

    prepared_folder(folder, build)
    train, val = (Rows(folder, part) for part in _PARTS)
    return train, val


def pack(segments: Iterable[Segment], *, length: int, packing: Packing) -> Iterator[list[Segment]]:
    """Rows of segments that hold at most `length` inputs; what is in memory is bounded.

    off: one segment in a row. cut: the next ones, cut where the row is full. whole: uncut, each in the
    fullest of some open rows that has room for it.
    """
    if packing == "off":
        return ([segment] for segment in segments)
    return _cut(segments, length) if packing == "cut" else _best_fit(segments, length)


def _cut(segments: Iterable[Segment], length: int) -> Iterator[list[Segment]]:
    row: list[Segment] = []
    free = length
    for start, count in segments:
        while count > 0:
            taken = min(count, free)
            row.append((start, taken))
            start, count, free = start + taken, count - taken, free - taken
            if free == 0:
                yield row
                row, free = [], length
    if row:
        yield row


def _best_fit(segments: Iterable[Segment], length: int) -> Iterator[list[Segment]]:
    open_rows: list[tuple[int, int, list[Segment]]] = []
    """Free inputs, number, segments; in this order."""
    for number, segment in enumerate(segments):
        place = bisect.bisect_left(open_rows, (segment[1],))
        if place < len(open_rows):
            free, opened, row = open_rows.pop(place)
        else:
            free, opened, row = length, number, []
        row.append(segment)
        if free == segment[1]:
            yield row
            continue
        bisect.insort(open_rows, (free - segment[1], opened, row))
        if len(open_rows) > _OPEN_ROWS:
            yield open_rows.pop(0)[2]
    yield from (row for _, _, row in open_rows)


def _rows(
    store: TokenStore, chosen: NDArray[np.bool_], length: int, packing: Packing
) -> Iterator[list[Segment]]:
    """Of the chosen documents; segments without a target that counts are left out."""
    longest = None if packing == "cut" else length
    pieces = (piece for piece in _pieces(store, chosen, longest) if _counts(store, piece))
    for row in pack(pieces, length=length, packing=packing):
        if kept := [segment for segment in row if _counts(store, segment)]:
            yield kept


def _pieces(store: TokenStore, chosen: NDArray[np.bool_], longest: int | None) -> Iterator[Segment]:
    """The chosen documents, cut where they have more inputs than `longest`; None: whole."""
    ends = store.ends
    for document in np.flatnonzero(chosen):
        start = int(ends[document - 1]) if document else 0
        last = int(ends[document]) - 1
        for first in range(start, last, longest or max(last - start, 1)):
            yield first, min(longest or last - start, last - first)


def _counts(store: TokenStore, segment: Segment) -> bool:
    start, count = segment
    return store.counted is None or bool(store.counted[start + 1 : start + 1 + count].any())


def _held_out(ranks: NDArray[np.float64], use: str, val_frac: float) -> NDArray[np.bool_]:
    if use != "split":
        return np.full(len(ranks), use == "val")
    held_out: NDArray[np.bool_] = ranks < val_frac
    if held_out.any() and not held_out.all():
        return held_out
    limit = val_limit(ranks.tolist(), val_frac)
    if limit is None:
        raise DataError(
            f"a source has {len(ranks)} document",
            rule="held-out documents are others than those that are trained on",
            remedy="add documents, or make two sources: use: train, and use: val",
        )
    return ranks < limit


def _write(folder: Path, part: str, rows: Iterable[list[Segment]]) -> None:
    num_segments = 0
    with ExitStack() as stack:
        segments, ends = (
            stack.enter_context(open(folder / f"{part}-{name}.bin", "wb")) for name in ("segments", "ends")
        )
        for row in rows:
            still_working()
            num_segments += len(row)
            segments.write(np.array(row, dtype=np.int64).tobytes())
            ends.write(np.int64(num_segments).tobytes())
        sync_file(segments)
        sync_file(ends)
