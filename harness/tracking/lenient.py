"""What people hand over to be logged, brought to names and values; an odd value costs only itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from harness.errors import TrackingError
from harness.runlog.codec import to_plain, with_nonfinite
from harness.runlog.soundness import MAX_DEPTH, MAX_ELEMENTS

__all__ = ["flattened", "named_values", "plain_values", "saved_values", "text_of"]

LONGEST_TEXT = 1000
"""Characters of the text that stands for an object."""


def named_values(given: Any) -> dict[Any, Any]:
    """The names and values of a mapping, a dataclass, a named tuple or a namespace; of None none.

    Raises:
        TrackingError: it has no names.
    """
    if given is None:
        return {}
    if isinstance(given, Mapping):
        return dict(given)
    if dataclasses.is_dataclass(given) and not isinstance(given, type):
        return {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    if hasattr(given, "_asdict"):
        return dict(given._asdict())
    if hasattr(given, "__dict__") and not isinstance(given, type) and not _is_value(given):
        return dict(vars(given))
    raise TrackingError(
        f"{text_of(given)[:60]!r} is of type {type(given).__name__}", rule="it has to be names with values"
    )


def flattened(
    values: Mapping[Any, Any], name: str = "", above: tuple[int, ...] = ()
) -> Iterator[tuple[str, Any]]:
    """Nested mappings under names like `val/loss`; one that is nested too deep, or in itself, stays."""
    above = (*above, id(values))
    for key, value in values.items():
        full = f"{name}/{text_of(key)}" if name else text_of(key)
        if isinstance(value, Mapping) and id(value) not in above and len(above) < MAX_DEPTH:
            yield from flattened(value, full, above)
        else:
            yield full, value


def plain_values(given: Any) -> dict[str, Any]:
    """Values as a log holds them, nested or not; what it cannot hold, such as a device or a class, as text.

    Raises:
        TrackingError: it has no names.
    """
    values: dict[str, Any] = _Walk(keys=text_of, leaf=_logged).mapping(named_values(given), (id(given),))
    return values


def saved_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """Values as a checkpoint holds them: tensors, arrays, bytes, tuples, sets, mappings' keys as they are."""
    return _Walk(keys=_saved_key, leaf=_saved, items=_saved_items).mapping(given, (id(given),))


def text_of(value: Any) -> str:
    """`str(value)`, or the name of its type where that fails; classes and functions by their names."""
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return f"{value.__module__}.{value.__qualname__}"
    try:
        return str(value)
    except Exception:  # noqa: BLE001  (an object's `__str__` may fail in any way)
        return f"({type(value).__name__})"


class _Walk:
    """Visits at most `MAX_ELEMENTS` values: what refers to itself in many ways has no end."""

    def __init__(
        self,
        *,
        keys: Callable[[Any], Any],
        leaf: Callable[[Any], Any],
        items: Callable[[Any, list[Any]], Any] = lambda given, walked: walked,
    ) -> None:
        self._keys, self._leaf, self._items = keys, leaf, items
        self._left = MAX_ELEMENTS

    def mapping(self, values: Mapping[Any, Any], above: tuple[int, ...]) -> dict[Any, Any]:
        """`above`: of which objects it is a part, itself last."""
        return {self._keys(key): self._value(value, above) for key, value in list(values.items())}

    def _value(self, value: Any, above: tuple[int, ...]) -> Any:
        self._left -= 1
        has_names = isinstance(value, Mapping) or (
            dataclasses.is_dataclass(value) and not isinstance(value, type)
        )
        has_items = isinstance(value, list | tuple | set | frozenset)
        is_too_deep = (has_names or has_items) and len(above) >= MAX_DEPTH
        if id(value) in above or is_too_deep or self._left < 0:
            return f"({type(value).__name__})"
        if has_names:
            return self.mapping(named_values(value), (*above, id(value)))
        if has_items:
            return self._items(value, [self._value(item, (*above, id(value))) for item in list(value)])
        return self._leaf(value)


def _is_value(given: Any) -> bool:
    """Whether it is a function, or one value, as a tensor is, which has a `__dict__` all the same."""
    kind = type(given)
    return callable(given) or callable(getattr(kind, "item", None)) or hasattr(kind, "__array__")


def _logged(value: Any) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    try:
        return with_nonfinite(*to_plain({"value": value}))["value"]
    except Exception:  # noqa: BLE001  (a tensor may refuse to be read in any way)
        return text_of(value)[:LONGEST_TEXT]


def _saved(value: Any) -> Any:
    is_array = getattr(value, "ndim", 0) > 0 and hasattr(value, "dtype") and not hasattr(value, "columns")
    return value if is_array or isinstance(value, bytes) else _logged(value)


def _saved_key(key: Any) -> Any:
    return key if key is None or isinstance(key, bool | int | float | str) else text_of(key)


def _saved_items(given: Any, walked: list[Any]) -> Any:
    try:
        return type(given)(walked) if type(given) in (tuple, set, frozenset) else walked
    except TypeError:  # what was left of an element does not hash
        return walked
