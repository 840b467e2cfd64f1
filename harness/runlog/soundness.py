"""What a record has to be like for readers to rely on it: types, ranges and shapes, kind by kind.

Checked once, where a line is decoded, so that whoever reads records need not ask again. A record that another
program wrote, or that was damaged and is JSON all the same, is none.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

from harness.errors import TrackingError

__all__ = [
    "LAST_ATTEMPT",
    "LAST_STEP",
    "MAX_DEPTH",
    "MAX_ELEMENTS",
    "SCALAR_KINDS",
    "checked_step",
    "is_sound",
]

SCALAR_KINDS = frozenset({"step", "eval", "epoch"})
MAX_DEPTH = 16
"""Levels of mappings and lists inside a record's values."""
MAX_ELEMENTS = 65_536
"""Longest list, array or tensor inside a record; what is larger belongs in a file or a histogram."""
MAX_VALUES = 1 << 22
"""Values in a record that are looked through; a line of that many is no run's settings."""
LAST_STEP = 2**63 - 1
LAST_ATTEMPT = 2**31 - 1
LAST_TIME = 253_402_300_799.0
"""The end of the year 9999, in seconds since the epoch."""

_CONTAINERS = frozenset({dict, list})
_NUMBERS = frozenset({int, float})
_NUMBERS_OR_BOOL = frozenset({int, float, bool})
_OF_SIDE_PROCESSES = frozenset({"system", "event"})
"""Kinds whose attempt may be -1: a side process knows of none."""
_FIELDS_OF_RUN: Mapping[str, type | tuple[type, ...]] = {
    "pid": int,
    "process_start": (int, float),
    "process_start_s": (int, float),
    "machine": str,
    "host": str,
    "command": list,
    "config": dict,
    "world_size": int,
    "checkpoint_dir": str,
}


def checked_step(step: Any) -> int:
    """A step's number as a record holds it.

    Raises:
        TrackingError: it is no whole number, negative, or has more than 63 bits.
    """
    try:
        number = operator.index(step)
    except TypeError:
        number = -1
    if not 0 <= number <= LAST_STEP:
        raise TrackingError(f"the step is {str(step)[:60]}", rule="it is a whole number in [0, 2^63)")
    return number


def is_sound(kind: Any, attempt: Any, step: Any, time: Any, values: Any) -> bool:
    """Whether these are the fields of a record. Of an unknown kind, the common ones."""
    if not (
        isinstance(kind, str) and isinstance(values, dict) and _is_whole(attempt, LAST_ATTEMPT, least=-1)
    ):
        return False
    if step is not None and not _is_whole(step, LAST_STEP):
        return False
    if not _is_number(time) or not 0 <= time <= LAST_TIME:
        return False
    if attempt < 0 and kind not in _OF_SIDE_PROCESSES:
        return False
    check: Callable[[dict[str, Any]], bool] = _CHECKS.get(kind, _is_bounded)
    return check(values)


def _is_whole(value: Any, largest: int, *, least: int = 0) -> bool:
    return type(value) is int and least <= value <= largest


def _is_number(value: Any) -> bool:
    return type(value) in _NUMBERS


def _is_bounded(values: dict[str, Any]) -> bool:
    """Whether they are no more, no longer and nested no deeper than a log allows; level by level."""
    level: list[Any] = [values]
    num_values = 0
    for _ in range(MAX_DEPTH):
        num_values += sum(map(len, level))
        if num_values > MAX_VALUES or any(type(one) is list and len(one) > MAX_ELEMENTS for one in level):
            return False
        inner = (one.values() if type(one) is dict else one for one in level)
        level = [value for some in inner for value in some if type(value) in _CONTAINERS]
        if not level:
            return True
    return False


def _anything(values: dict[str, Any]) -> bool:
    """Of a record of metrics only numbers are read."""
    return True


def _is_run(values: dict[str, Any]) -> bool:
    typed = all(isinstance(values[name], of) for name, of in _FIELDS_OF_RUN.items() if name in values)
    return typed and _is_bounded(values)


def _is_event(values: dict[str, Any]) -> bool:
    return isinstance(values.get("name", ""), str) and _is_bounded(values)


def _are_layers(values: dict[str, Any]) -> bool:
    return all(isinstance(row, dict) for row in values.values())


def _are_ranks(values: dict[str, Any]) -> bool:
    return all(
        isinstance(row, list) and 0 < len(row) <= MAX_ELEMENTS and _NUMBERS_OR_BOOL.issuperset(map(type, row))
        for row in values.values()
    )


def _is_rewind(values: dict[str, Any]) -> bool:
    return _is_whole(values.get("step"), LAST_STEP)


def _is_ledger(values: dict[str, Any]) -> bool:
    seconds = values.get("seconds")
    if not isinstance(seconds, dict) or not _is_whole(values.get("steps_made"), LAST_STEP):
        return False
    return all(_is_number(spent) and 0 <= spent <= LAST_TIME for spent in seconds.values())


def _are_files(values: dict[str, Any]) -> bool:
    return all(isinstance(one, dict) and isinstance(one.get("file"), str) for one in values.values())


def _are_images(values: dict[str, Any]) -> bool:
    sizes = (one.get(name) for one in values.values() for name in ("height", "width", "channels"))
    return _are_files(values) and all(_is_whole(size, 2**31 - 1) for size in sizes)


def _is_graph(values: dict[str, Any]) -> bool:
    return isinstance(values.get("file"), str)


def _are_histograms(values: dict[str, Any]) -> bool:
    return all(isinstance(one, dict) and _is_histogram(one) for one in values.values())


def _is_histogram(one: dict[str, Any]) -> bool:
    edges, counts = one.get("edges"), one.get("counts")
    if not isinstance(edges, list) or not isinstance(counts, list) or len(edges) != len(counts) + 1:
        return False
    numbers = [one.get(name) for name in ("min", "max", "num", "sum", "sum_squares")]
    return len(edges) <= MAX_ELEMENTS and all(
        _NUMBERS.issuperset(map(type, some)) for some in (edges, counts, numbers)
    )


_CHECKS: Mapping[str, Callable[[dict[str, Any]], bool]] = {
    **dict.fromkeys((*SCALAR_KINDS, "system"), _anything),
    "run": _is_run,
    "event": _is_event,
    "layers": _are_layers,
    "ranks": _are_ranks,
    "rewind": _is_rewind,
    "ledger": _is_ledger,
    "image": _are_images,
    "graph": _is_graph,
    "histogram": _are_histograms,
}
