"""One metric as entries of bounded number: exact while it is short, ever wider as it grows, no spike lost.

An entry stands for some consecutive points and carries the smallest and the largest of them, their sum, how
many were not finite, and where in the log they are written. A trace begins with one entry a point. When it
has `most` of them, neighbours are merged in pairs and each new entry stands for twice as many points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from harness.runlog.series import Series

__all__ = [
    "ENTRY",
    "TOTAL_SCALE",
    "Entries",
    "Trace",
    "entries_of",
    "merged",
    "one_after_another",
    "reduced",
    "visible",
]

ENTRY = np.dtype(
    [
        ("first_block", "<i4"),
        ("last_block", "<i4"),
        ("attempt", "<i4"),
        ("num_finite", "<i4"),
        ("num_nan", "<i4"),
        ("num_inf", "<i4"),
        ("first_step", "<i8"),
        ("last_step", "<i8"),
        ("time", "<f8"),  # of the first point
        ("low", "<f8"),  # inf without a finite point
        ("total", "<f8"),  # of finite points, times `TOTAL_SCALE`
        ("high", "<f8"),  # -inf without a finite point
        ("last", "<f8"),
    ]
)
Entries = npt.NDArray[np.void]
"""Of dtype `ENTRY`, one dimension, in the order of writing."""

TOTAL_SCALE = 2.0**-64
"""With it no total of as many points as a log can hold is more than a float."""
OVERHEAD_BYTES = 1024
"""Of a trace: its object, its arrays' headers and its name."""
_NONE = np.empty(0, dtype=ENTRY)
_FIRSTS = ("first_block", "attempt", "time")
_SUMS = ("num_finite", "num_nan", "num_inf", "total")


class Trace:
    """A metric's entries.

    A step that is written again replaces its earlier point while that stands for itself: in the same read, or
    before entries were merged over it. Written later, both points count in an entry of several.

    Args:
        most: Entries kept at most, beside one for each stretch of an attempt; 80 bytes each.
        replaces: Whether a later point of a step replaces an earlier one; samples have no steps.
    """

    __slots__ = ("_full", "_num_full", "_num_stretches", "_replaces", "_rest", "most", "width")

    def __init__(self, most: int = 8192, *, replaces: bool = True) -> None:
        self.most = most
        self.width = 1
        """Points that an entry stands for, unless an attempt ended before it was full."""
        self._replaces = replaces
        self._full = self._rest = _NONE
        self._num_full = self._num_stretches = 0

    @classmethod
    def restored(
        cls, entries: Entries, *, width: int, num_rest: int, most: int, replaces: bool = True
    ) -> Trace:
        """A trace as it was: `entries` and `num_rest` are what it had then."""
        trace = cls(most, replaces=replaces)
        trace.width = width
        trace._full = entries[: len(entries) - num_rest]
        trace._num_full = len(trace._full)
        trace._rest = entries[len(entries) - num_rest :]
        trace._num_stretches = len(_begins(entries["attempt"]))
        return trace

    @property
    def entries(self) -> Entries:
        """All of them; the newest ones still stand for one point each."""
        full = self._full[: self._num_full]
        return one_after_another([full, self._rest])

    @property
    def num_bytes(self) -> int:
        """Size in memory, about."""
        return OVERHEAD_BYTES + self._full.nbytes + self._rest.nbytes

    @property
    def num_points(self) -> int:
        """How many points there have been."""
        entries = self.entries
        return int(sum(entries[name].sum() for name in ("num_finite", "num_nan", "num_inf")))

    @property
    def newest(self) -> np.void:
        """The last of them."""
        newest: np.void = self._rest[-1] if len(self._rest) else self._full[self._num_full - 1]
        return newest

    @property
    def last_step(self) -> int:
        """The highest step of them, which need not be that of the newest."""
        parts = (self._full["last_step"][: self._num_full], self._rest["last_step"])
        return max(int(part.max()) for part in parts if len(part))

    @property
    def num_rest(self) -> int:
        """How many of the newest entries are not merged yet."""
        return len(self._rest)

    def add(self, points: Entries) -> None:
        """Appends entries of one point each, all of one attempt."""
        rest = self._rest
        if not self._num_stretches or self.newest["attempt"] != points["attempt"][0]:
            self._num_stretches += 1
            if len(rest):
                self._append(merged(rest, np.zeros(1, dtype=np.int64)))
                rest = rest[:0]
        points = one_after_another([rest, points])
        if self._replaces:
            points = _last_of_steps(points)
        num_ready = (len(points) - 1) // self.width * self.width  # the newest may be written again
        if num_ready:
            self._append(merged(points[:num_ready], np.arange(0, num_ready, self.width)))
        self._rest = points[num_ready:].copy()  # else it would keep all of what was read
        while self._num_full > self.most + self._num_stretches:
            self._widen()

    def _append(self, entries: Entries) -> None:
        size = self._num_full + len(entries)
        if size > len(self._full):
            larger = np.empty(max(size, 2 * len(self._full)), dtype=ENTRY)
            larger[: self._num_full] = self._full[: self._num_full]
            self._full = larger
        self._full[self._num_full : size] = entries
        self._num_full = size

    def _widen(self) -> None:
        full = self._full[: self._num_full]
        if self.width == 1 and self._replaces:
            full = _last_of_steps(full)
        begins = _begins(full["attempt"])
        at = np.arange(len(full))
        first_of_attempt = begins[np.searchsorted(begins, at, side="right") - 1]
        starts = np.flatnonzero((at - first_of_attempt) % 2 == 0)  # pairs never reach into another attempt
        self._full = merged(full, starts)
        self._num_full = len(self._full)
        self.width *= 2


def _begins(attempts: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Where the stretches of one attempt each begin."""
    changes = np.flatnonzero(attempts[1:] != attempts[:-1]) + 1
    return np.concatenate([np.zeros(min(1, len(attempts)), dtype=np.int64), changes])


def _last_of_steps(points: Entries) -> Entries:
    """Of points with the same attempt and step the one written last, in the order of writing."""
    attempts, steps = points["attempt"], points["first_step"]
    if ((steps[1:] > steps[:-1]) | (attempts[1:] != attempts[:-1])).all():  # as it nearly always is
        return points
    order = np.lexsort((steps, attempts))
    is_same = (steps[order][1:] == steps[order][:-1]) & (attempts[order][1:] == attempts[order][:-1])
    last: Entries = points[np.sort(order[np.append(~is_same, True)])]
    return last


def one_after_another(parts: Sequence[Entries]) -> Entries:
    """What `np.concatenate` would give, which is slow for small arrays of many fields."""
    parts = [part for part in parts if len(part)]
    if len(parts) == 1:
        return parts[0]
    result = np.empty(sum(map(len, parts)), dtype=ENTRY)
    end = 0
    for part in parts:
        begin, end = end, end + len(part)
        result[begin:end] = part
    return result


def entries_of(series: Series, *, attempt: int, block: int) -> Entries:
    """One entry for each point."""
    steps, values, times = series
    finite = np.isfinite(values)
    entries = np.empty(len(values), dtype=ENTRY)
    entries["first_block"] = entries["last_block"] = block
    entries["attempt"] = attempt
    entries["num_finite"] = finite
    entries["num_nan"] = np.isnan(values)
    entries["num_inf"] = np.isinf(values)
    entries["first_step"] = entries["last_step"] = steps
    entries["time"] = times
    entries["low"] = np.where(finite, values, np.inf)
    entries["total"] = np.where(finite, values, 0.0) * TOTAL_SCALE
    entries["high"] = np.where(finite, values, -np.inf)
    entries["last"] = values
    return entries


def merged(entries: Entries, starts: npt.NDArray[np.int64]) -> Entries:
    """One entry for each group of neighbours; a group begins at each of `starts`, the first at 0."""
    if len(starts) == len(entries):
        return entries
    ends = np.append(starts[1:], len(entries)) - 1
    result = np.empty(len(starts), dtype=ENTRY)
    for name in _FIRSTS:
        result[name] = entries[name][starts]
    for name in _SUMS:
        result[name] = reduced(entries[name], starts, np.add)
    result["last_block"] = entries["last_block"][ends]
    result["last"] = entries["last"][ends]
    for name in ("first_step", "low"):
        result[name] = reduced(entries[name], starts, np.minimum)
    for name in ("last_step", "high"):
        result[name] = reduced(entries[name], starts, np.maximum)
    return result


def reduced(column: npt.NDArray[Any], starts: npt.NDArray[np.int64], how: np.ufunc) -> npt.NDArray[Any]:
    """One number for each group of neighbours; a group begins at each of `starts`. Counts come as 64 bits."""
    dtype = np.dtype(np.int64) if column.dtype.kind == "i" else column.dtype
    if len(starts) == len(column):
        return column.astype(dtype)
    if how is np.add and not column.any():  # nearly always, of what is not finite
        return np.zeros(len(starts), dtype=dtype)
    numbers: npt.NDArray[Any] = how.reduceat(column, starts, dtype=dtype)
    return numbers


def visible(
    entries: Entries, limits: Mapping[int, float], within: tuple[int, int] | None = None
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which entries are shown as they are, and which are cut in two by a limit.

    Args:
        limits: For each attempt the step from which on a later one replaces it; see `Timeline.limits`.
        within: First and last step to show; None for all.
    """
    first, last = entries["first_step"], entries["last_step"]
    if within is None and min(limits.values(), default=np.inf) == np.inf:  # nothing was replaced
        return np.ones(len(entries), dtype=np.bool_), np.zeros(len(entries), dtype=np.bool_)
    attempts = np.unique(entries["attempt"])
    before = np.array([limits.get(int(attempt), np.inf) for attempt in attempts])
    before = before[np.searchsorted(attempts, entries["attempt"])]
    low, high = (-np.inf, np.inf) if within is None else within
    touched = (first < before) & (first <= high) & (last >= low)
    whole = (last < before) & (first >= low) & (last <= high)
    return touched & whole, touched & ~whole
