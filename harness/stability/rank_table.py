"""What each rank said of its share of a step, as a table: rows are made when they are asked for.

There may be thousands of ranks, and a row for each in every step would keep every rank's host busy.

Legend: W ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import overload

import numpy as np
import numpy.typing as npt

from harness.records import RankRow
from harness.stability.layout import MAX_ABS, NUM_INF, NUM_NAN, NUM_ZERO, SUM_SQUARES
from harness.stability.rank_statistics import (
    COMPUTE_S,
    DATA_WAIT_S,
    LOSS_SUM,
    NUM_SAVES,
    STOP_REQUESTED,
    TOKENS,
)

__all__ = ["Floats", "RankTable", "count", "rank_column", "rank_columns"]

Floats = npt.NDArray[np.float64]

_FIELDS = {
    "compute_s": COMPUTE_S,
    "data_wait_s": DATA_WAIT_S,
    "stop_requested": STOP_REQUESTED,
    "num_saves": NUM_SAVES,
}
"""Of rows that are as they were sent."""


class RankTable(Sequence[RankRow]):
    """Rank statistics in host memory as a sequence of rows; equal to any sequence of equal rows.

    Args:
        numbers: `[W, NUM_FIELDS]`, kept.
        divisor: What turns a measured gradient into the true one.
        counts_tokens: Whether the loop tells of tokens.
    """

    def __init__(self, numbers: Floats, *, divisor: float, counts_tokens: bool) -> None:
        self._numbers, self._divisor, self._counts_tokens = numbers, divisor, counts_tokens

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> RankRow: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[RankRow, ...]: ...

    def __getitem__(self, index: int | slice) -> RankRow | tuple[RankRow, ...]:
        ranks = range(len(self))[index]
        return self._row(ranks) if isinstance(ranks, int) else tuple(self._row(rank) for rank in ranks)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(tuple(self))

    def column(self, name: str) -> Floats:
        """One field of all rows, `[W]`, as float64."""
        if name in _FIELDS:
            return self._numbers[:, _FIELDS[name]]
        if name == "grad_norm":
            norms: Floats = np.sqrt(self._numbers[:, SUM_SQUARES]) / self._divisor
            return norms
        if name == "loss":
            tokens = self._numbers[:, TOKENS]
            nothing = np.full(len(self), math.nan)
            losses: Floats = np.divide(self._numbers[:, LOSS_SUM], tokens, out=nothing, where=tokens != 0)
            return losses
        return np.array([float(getattr(row, name)) for row in self])

    def _row(self, rank: int) -> RankRow:
        one = self._numbers[rank].tolist()
        tokens = one[TOKENS]
        return RankRow(
            rank=rank,
            loss=one[LOSS_SUM] / tokens if tokens else math.nan,
            num_tokens=int(tokens) if self._counts_tokens else 0,
            grad_norm=math.sqrt(one[SUM_SQUARES]) / self._divisor,
            max_abs=one[MAX_ABS] / self._divisor,
            num_nan=count(one[NUM_NAN]),
            num_inf=count(one[NUM_INF]),
            num_zero=count(one[NUM_ZERO]),
            compute_s=one[COMPUTE_S],
            data_wait_s=one[DATA_WAIT_S],
            stop_requested=bool(one[STOP_REQUESTED]),
            num_saves=int(one[NUM_SAVES]),
        )


def rank_column(rows: Sequence[RankRow], name: str) -> Floats:
    """One field of all rows of a record, `[W]`, without making the rows where they are a table."""
    if isinstance(rows, RankTable):
        return rows.column(name)
    return np.array([float(getattr(row, name)) for row in rows])


def rank_columns(rows: Sequence[RankRow], *names: str) -> dict[str, list[float]]:
    """Several fields of all rows, as plain numbers."""
    return {name: rank_column(rows, name).tolist() for name in names}


def count(value: float) -> int:
    """A count as an integer; -1: not measured."""
    return -1 if math.isnan(value) else int(value)
