"""Rows of several sources as one data set, mixed by weights. Which row an index is, is computed.

An epoch is as long as it takes to see every row of every source, at the shares that the weights ask for; the
rows of a source that has fewer come again. The loader's order does the shuffling.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from harness.data import Batch
from harness.data.task import IGNORED
from harness.errors import DataError
from harness.tasks.hf.packing import Rows
from harness.tasks.hf.store import TokenStore

__all__ = ["Mixture", "Part"]

_SOURCE = re.compile(r"source ([0-9]{1,9}), row ([0-9]{1,18})")


@dataclass(frozen=True, slots=True)
class Part:
    """The rows of one source that are trained on, or that are held out."""

    store: TokenStore
    rows: Rows
    source: int
    """Which of the sources, counted from 0."""
    weight: float = 0.0
    """Relative to the other parts'; 0 for all: in proportion to their rows."""


class Mixture:
    """Samples of `length` inputs; see `harness.data.Dataset`.

    Args:
        parts: At least one with a row.
        length: Inputs of a row; shorter ones are filled up.
        pad: The token that they are filled with, which no target is.
        digest: What tells the content from any other's, in words.

    Raises:
        DataError: there are no rows, or some parts have a weight and others none.
    """

    def __init__(self, parts: Sequence[Part], *, length: int, pad: int, digest: str) -> None:
        self._parts = [part for part in parts if len(part.rows)]
        self._length, self._pad, self._digest = length, pad, digest
        if not self._parts:
            raise DataError("no document is left for training, or none for validation", remedy="add data")
        if len({part.weight > 0 for part in self._parts}) == 2:
            raise DataError(
                "some sources have a weight and others have not",
                rule="weights are shares of all samples",
                remedy="give every source that is trained on a weight, or none",
            )
        self._ends = np.cumsum(_counts([(len(part.rows), part.weight) for part in self._parts]))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def fingerprint(self) -> str:
        """Tells tokens, packing and mixture from any other."""
        return self._digest

    def __getitem__(self, index: int) -> Batch:
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """`input_ids`, `position_ids`, `targets`, int64 `[len(indices), length]`, and `source`, int64
        `[len(indices)]`. Positions begin at 0 with each document, which is how the models of transformers
        know where one ends; targets that do not count are -100."""
        shape = (len(indices), self._length)
        inputs = np.full(shape, self._pad, dtype=np.int64)
        targets = np.full(shape, IGNORED, dtype=np.int64)
        positions = np.empty(shape, dtype=np.int64)
        sources = np.empty(len(indices), dtype=np.int64)
        for place, index in enumerate(indices):
            part, row = self._place(index)
            sources[place] = part.source
            _fill(part.store, part.rows[row], inputs[place], targets[place], positions[place])
        arrays = {"input_ids": inputs, "position_ids": positions, "targets": targets, "source": sources}
        return {name: torch.from_numpy(values) for name, values in arrays.items()}

    def source_of(self, index: int) -> str:
        """`source S, row R`: the same wherever the row comes again."""
        part, row = self._place(index)
        return f"source {part.source}, row {row}"

    def indices_of(self, sources: Collection[str]) -> dict[str, list[int]]:
        """All samples that are these rows, of the rows that there are."""
        found: dict[str, list[int]] = {}
        for source in sources:
            match = _SOURCE.fullmatch(source)
            for number, part in enumerate(self._parts if match else ()):
                if match is not None and int(match[1]) == part.source and int(match[2]) < len(part.rows):
                    start = int(self._ends[number - 1]) if number else 0
                    first, end = start + int(match[2]), int(self._ends[number])
                    found[source] = list(range(first, end, len(part.rows)))
        return found

    def _place(self, index: int) -> tuple[Part, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        part = self._parts[number]
        start = int(self._ends[number - 1]) if number else 0
        return part, (index - start) % len(part.rows)


def _counts(parts: Sequence[tuple[int, float]]) -> list[int]:
    """Samples of each part in an epoch; `parts`: rows and weight of each."""
    if not any(weight for _, weight in parts):
        return [rows for rows, _ in parts]
    per_weight = max(rows / weight for rows, weight in parts)
    return [max(rows, math.ceil(weight * per_weight - 1e-9)) for rows, weight in parts]


def _fill(
    store: TokenStore,
    segments: NDArray[np.int64],
    inputs: NDArray[np.int64],
    targets: NDArray[np.int64],
    positions: NDArray[np.int64],
) -> None:
    end = 0
    for start, count in segments.tolist():
        here, following = slice(end, end + count), slice(start + 1, start + 1 + count)
        inputs[here] = store.tokens[start : start + count]
        targets[here] = store.tokens[following]
        if store.counted is not None:
            targets[here][~store.counted[following]] = IGNORED
        positions[here] = np.arange(count)
        end += count
    positions[end:] = np.arange(len(positions) - end)
