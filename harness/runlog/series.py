"""Metrics as arrays, and the making of them from records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Layers", "Row", "Series", "joined", "last_of_each_step", "series_of"]

Row = tuple[int, float, Mapping[str, Any]]
"""Step, time and values of a record."""
_NUMBERS = frozenset({float, int, bool})


class Series(NamedTuple):
    """One metric over the run: equally long arrays, ordered by step, each step once."""

    steps: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]
    times: npt.NDArray[np.float64]
    """Seconds since the epoch."""

    def at(self, index: npt.NDArray[Any]) -> Series:
        """The points that an index or a mask selects."""
        return Series(self.steps[index], self.values[index], self.times[index])


class Layers(NamedTuple):
    """One statistic of every parameter over the run."""

    steps: npt.NDArray[np.int64]
    names: list[str]
    values: npt.NDArray[np.float64]
    """[step, name]; NaN where a step did not log the parameter."""


def joined(parts: list[Series]) -> Series:
    """One after another."""
    if not parts:
        return Series(np.array([], dtype=np.int64), np.array([]), np.array([]))
    return Series(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def last_of_each_step(steps: npt.NDArray[np.int64], keep: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Indices that sort the kept steps, the last one of equal ones."""
    kept = np.flatnonzero(keep)
    order = kept[np.argsort(steps[kept], kind="stable")]
    ordered = steps[order]
    return order[np.append(ordered[1:] != ordered[:-1], True)] if len(order) else order


def series_of(rows: Sequence[Row]) -> dict[str, Series]:
    """Every metric of some records, in the order of writing; values that are no numbers are left out.

    Records that log the same names are turned into arrays together, which is what makes it quick.
    """
    alike: dict[tuple[str, ...], list[int]] = {}
    for number, (_, _, values) in enumerate(rows):
        alike.setdefault(tuple(values), []).append(number)
    parts: dict[str, list[tuple[npt.NDArray[np.int64], Series]]] = {}
    for names, numbers in alike.items():
        some = [rows[number] for number in numbers]
        order = np.array(numbers, dtype=np.int64)
        steps = np.array([step for step, _, _ in some], dtype=np.int64)
        times = np.array([time for _, time, _ in some], dtype=np.float64)
        for name, hold, column in _columns(names, some):
            kept = slice(None) if hold is None else hold
            parts.setdefault(name, []).append((order[kept], Series(steps[kept], column, times[kept])))
    return {name: _in_order(several) for name, several in parts.items()}


def _columns(
    names: tuple[str, ...], rows: Sequence[Row]
) -> Iterable[tuple[str, npt.NDArray[np.bool_] | None, npt.NDArray[np.float64]]]:
    """Name, which rows hold a number (None: all), and those numbers, for every name that has any."""
    table = [list(values.values()) for _, _, values in rows]
    if all(_NUMBERS.issuperset(map(type, line)) for line in table):
        for name, line in zip(names, np.array(table, dtype=np.float64).T, strict=True):
            yield name, None, line
        return
    for name, column in zip(names, zip(*table, strict=True), strict=True):
        hold = np.array([isinstance(value, (float, int)) for value in column])
        if hold.any():
            yield name, hold, np.array([v for v in column if isinstance(v, (float, int))], dtype=np.float64)


def _in_order(parts: list[tuple[npt.NDArray[np.int64], Series]]) -> Series:
    """As written: records that log other names may lie between."""
    if len(parts) == 1:
        return parts[0][1]
    order = np.argsort(np.concatenate([numbers for numbers, _ in parts]))
    return joined([series for _, series in parts]).at(order)
