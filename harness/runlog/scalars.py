"""Which numbers of a record are curves, and under which names."""

from __future__ import annotations

import math

from harness.runlog.codec import Record
from harness.runlog.names import Prefix

__all__ = ["scalars_of"]


def scalars_of(record: Record) -> dict[str, float]:
    """The numbers of a record that are shown as curves; those of layers and ranks by names of their own."""
    if record.kind in ("step", "eval", "epoch", "system"):
        return {name: value for name, value in record.values.items() if isinstance(value, (int, float))}
    if record.kind == "layers":
        return {
            f"{Prefix.LAYERS}{statistic}/{name}": value
            for statistic, row in record.values.items()
            for name, value in row.items()
            if isinstance(value, (int, float))
        }
    if record.kind == "ranks":
        return {
            f"{Prefix.RANKS}{name}/{part}": value
            for name, row in record.values.items()
            for part, value in _spread(row).items()
        }
    return {}


def _spread(row: list[float]) -> dict[str, float]:
    """Minimum, mean and maximum over ranks, and which rank holds the maximum; all NaN if one rank is."""
    for rank, value in enumerate(row):
        if math.isnan(value):
            return {"min": value, "mean": value, "max": value, "max_rank": rank}
    largest = max(row)
    return {"min": min(row), "mean": sum(row) / len(row), "max": largest, "max_rank": row.index(largest)}
