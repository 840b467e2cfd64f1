"""A record and its line: one JSON object, with NaN and infinities kept beside the values.

JSON has no NaN, so orjson writes `null`. `nonfinite` says which nulls are meant, and where:

    {"kind":"step","attempt":0,"step":7,"time":1.7e9,"values":{"train/loss":null},"nonfinite":[["nan","train/loss"]]}

Each entry is the value followed by its path inside `values`. A null without an entry is None.
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
import math
from collections.abc import Iterable, Mapping
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import orjson

from harness.errors import TrackingError
from harness.runlog.soundness import MAX_DEPTH, MAX_ELEMENTS, is_sound

__all__ = ["KINDS", "Record", "decode", "encode", "to_plain", "with_nonfinite"]

KINDS = frozenset(
    {"run", "step", "eval", "epoch", "event", "hparams", "rewind", "ledger", "end"}
    | {"text", "image", "histogram", "graph", "layers", "ranks", "system"}
)

_NUMBERS = frozenset({float, int, bool})
_NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One thing that happened in a run."""

    kind: str
    attempt: int
    """Counts restarts and rollbacks; a later attempt replaces the steps that it covers."""
    step: int | None
    time: float
    """Seconds since the epoch."""
    values: dict[str, Any]


def encode(kind: str, values: Mapping[str, Any], *, attempt: int, step: int | None, time: float) -> bytes:
    """The record's line. Costs little more than orjson where all values are finite Python numbers.

    Raises:
        TrackingError: a value that has no meaning in a log, such as an object or a complex number.
    """
    record: dict[str, Any] = {"kind": kind, "attempt": attempt, "step": step, "time": time, "values": values}
    if _all_finite_numbers(values):
        try:
            return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)
        except TypeError:  # a key that is no string, an integer of more than 64 bits
            pass
    record["values"], nonfinite = to_plain(values)
    if nonfinite:
        record["nonfinite"] = nonfinite
    return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)


def decode(line: bytes) -> Record | None:
    """The record of a line, or None if the line is torn, damaged or none of ours; see `soundness`."""
    try:
        fields = orjson.loads(line)
        record = Record(*(fields[name] for name in ("kind", "attempt", "step", "time", "values")))
        with_nonfinite(record.values, fields.get("nonfinite", ()))
    except (ValueError, TypeError, LookupError, AttributeError):
        return None
    sound = is_sound(record.kind, record.attempt, record.step, record.time, record.values)
    return record if sound else None


def to_plain(values: Mapping[Any, Any]) -> tuple[dict[str, Any], list[list[Any]]]:
    """Values as JSON can hold them, and the non-finite ones as `[spelling, *path]`.

    Takes Python and numpy numbers, tensors and arrays (a copy from the device synchronises), `Decimal`,
    `Fraction`, strings, paths, dates, enumerations, dataclasses and nested mappings and sequences.
    """
    nonfinite: list[list[Any]] = []
    return {_text(key): _plain(value, (_text(key),), nonfinite) for key, value in values.items()}, nonfinite


def with_nonfinite(values: dict[str, Any], nonfinite: Iterable[list[Any]]) -> dict[str, Any]:
    """Puts back in place what `to_plain` has taken out."""
    for spelling, *path in nonfinite:
        parent: Any = values
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1]] = _NONFINITE[spelling]
    return values


def _all_finite_numbers(values: Mapping[str, Any]) -> bool:
    try:
        # One NaN or infinity makes the sum one; a finite sum proves all finite.
        return _NUMBERS.issuperset(map(type, values.values())) and math.isfinite(sum(values.values()))
    except OverflowError:
        return False


def _plain(value: Any, path: tuple[str | int, ...], nonfinite: list[list[Any]]) -> Any:
    value = _unwrapped(value, path)
    if len(path) >= MAX_DEPTH and isinstance(value, (Mapping, list, tuple, set, frozenset)):
        raise _refused(path, f"nested deeper than {MAX_DEPTH} levels", "log the parts that matter by name")
    if isinstance(value, Mapping):
        return {_text(k): _plain(v, (*path, _text(k)), nonfinite) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        if len(value) > MAX_ELEMENTS:
            raise _refused(path, f"{len(value)} elements long", "log a histogram of it, or save it to a file")
        return [_plain(v, (*path, i), nonfinite) for i, v in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite.append(["nan" if math.isnan(value) else "inf" if value > 0 else "-inf", *path])
        return None
    return value


def _unwrapped(value: Any, path: tuple[str | int, ...]) -> Any:
    """One layer: an exact JSON type, or a mapping or sequence still to be walked."""
    if value is None or isinstance(value, (bool, Mapping, list, tuple, set, frozenset)):
        return value
    if isinstance(value, enum.Enum):
        return _unwrapped(value.value, path)
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int):
        # Beyond 64 bits as a float, which is also what every reader makes of it.
        return int(value) if -(2**63) <= value < 2**64 else _float(int(value), path)
    if isinstance(value, (float, Decimal, Fraction)):
        return _float(value, path)
    if isinstance(value, (Path, datetime.date, datetime.time, datetime.timedelta)):
        return _text(str(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return _from_array(value, path)


def _from_array(value: Any, path: tuple[str | int, ...]) -> Any:
    """numpy scalars, numpy arrays and tensors all know `tolist`."""
    size = getattr(value, "size", 1)
    num_elements = value.numel() if hasattr(value, "numel") else size
    if isinstance(num_elements, int) and num_elements > MAX_ELEMENTS:
        raise _refused(
            path, f"an array of {num_elements} elements", "log a histogram of it, or save it to a file"
        )
    try:
        plain = value.tolist()
    except Exception as error:
        raise _refused(
            path, f"of type {type(value).__name__}", "log a number, a string or a tensor"
        ) from error
    if type(plain) is type(value):  # numpy's long double has no Python equal
        return _float(value, path)
    return _unwrapped(plain, path)


def _float(value: Any, path: tuple[str | int, ...]) -> float:
    try:
        return float(value)
    except (ValueError, OverflowError, TypeError) as error:
        raise _refused(
            path, f"{str(value)[:40]}, which no float can hold", "scale it or log it as text"
        ) from error


def _text(value: Any) -> str:
    """Valid UTF-8: lone surrogates, as in undecodable file names, are escaped."""
    return str(value).encode(errors="backslashreplace").decode()


def _refused(path: tuple[str | int, ...], what: str, remedy: str) -> TrackingError:
    name = "/".join(map(str, path))[:200]
    return TrackingError(
        f"the value of {name!r} is {what}", rule="a log holds numbers and text, not objects", remedy=remedy
    )
