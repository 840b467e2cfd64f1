"""State as JSON with holes: every tensor is replaced by its name, and the rest is plain data.

So nothing has to be pickled. Lists and dictionaries with string keys stand for themselves; what JSON does
not know is an object with one key that begins with `$`.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from harness.errors import CheckpointError

__all__ = ["fill", "flatten", "plain", "tensor_names"]

Json = Any


def flatten(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Json:
    """Describes `value` as JSON data and adds the tensors in it to `tensors`, by their place in it.

    A tensor that occurs twice, as tied weights do, is named twice and added once. Tensors are not copied.

    Raises:
        CheckpointError: something in `value` is neither plain data nor a tensor.
    """
    return _Flattener(tensors).describe(value, name)


def plain(value: Any, name: str) -> Json:
    """Describes plain data.

    Raises:
        CheckpointError: there are tensors or other objects in it.
    """
    tensors: dict[str, torch.Tensor] = {}
    described = flatten(value, name, tensors)
    if tensors:
        raise CheckpointError(f"{next(iter(tensors))} is a tensor", rule=f"{name} is plain JSON data")
    return described


def fill(described: Json, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The value that `flatten` described, with the tensors of these names in their places.

    Raises:
        CheckpointError: the description holds what `flatten` never writes.
    """
    if isinstance(described, list):
        return [fill(item, tensors) for item in described]
    if not isinstance(described, dict):
        return described
    mark = next(iter(described), "")
    if len(described) == 1 and mark.startswith("$"):
        return _unmark(mark, described[mark], tensors)
    return {key: fill(item, tensors) for key, item in described.items()}


def tensor_names(described: Json) -> list[str]:
    """The names of all tensors in a description, in order, each once."""
    names: dict[str, None] = {}
    todo = [described]
    while todo:
        item = todo.pop()
        if isinstance(item, dict):
            mark = next(iter(item), "")
            if mark in ("$tensor", "$array"):
                names[item[mark]] = None
            else:
                todo.extend(reversed(list(item.values())))
        elif isinstance(item, list):
            todo.extend(reversed(item))
    return list(names)


class _Flattener:
    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self._names = {id(tensor): name for name, tensor in tensors.items()}

    def describe(self, value: Any, name: str) -> Json:
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, torch.Tensor):
            return {"$tensor": self._add(value, name)}
        if isinstance(value, Mapping):
            return self._describe_mapping(value, name)
        if isinstance(value, list):
            return self._describe_items(value, name)
        return self._describe_marked(value, name)

    def _describe_marked(self, value: Any, name: str) -> Json:
        if isinstance(value, float):
            return value if math.isfinite(value) else {"$float": str(value)}
        if isinstance(value, tuple):
            return {"$tuple": self._describe_items(value, name)}
        if isinstance(value, bytes):
            return {"$bytes": base64.b64encode(value).decode()}
        if isinstance(value, np.generic):
            return self.describe(value.item(), name)
        if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
            return {"$array": self._add(torch.from_numpy(value.copy()), name)}
        raise CheckpointError(
            f"{name} is a {type(value).__qualname__}, which cannot be saved",
            rule="state consists of tensors, arrays, numbers, strings, bytes, lists, tuples and dictionaries",
            remedy="let state_dict() return these, and load_state_dict() make the object from them",
        )

    def _describe_mapping(self, value: Mapping[Any, Any], name: str) -> Json:
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: self.describe(item, f"{name}/{key}") for key, item in value.items()}
        pairs = [
            [self.describe(key, f"{name}/key"), self.describe(item, f"{name}/{key}")]
            for key, item in value.items()
        ]
        return {"$dict": pairs}

    def _describe_items(self, items: list[Any] | tuple[Any, ...], name: str) -> Json:
        return [self.describe(item, f"{name}/{index}") for index, item in enumerate(items)]

    def _add(self, tensor: torch.Tensor, name: str) -> str:
        known = self._names.get(id(tensor))
        if known is not None:
            return known
        while name in self._tensors:
            name += "~"
        self._tensors[name] = tensor
        self._names[id(tensor)] = name
        return name


def _unmark(mark: str, content: Json, tensors: Mapping[str, torch.Tensor]) -> Any:
    restore: dict[str, Callable[[], Any]] = {
        "$tensor": lambda: tensors[content],
        "$array": lambda: tensors[content].numpy(),
        "$tuple": lambda: tuple(fill(content, tensors)),
        "$float": lambda: float(content),
        "$bytes": lambda: base64.b64decode(content),
        "$dict": lambda: {fill(key, tensors): fill(item, tensors) for key, item in content},
    }
    if mark not in restore:
        raise CheckpointError(
            f"the checkpoint's description holds {mark!r}", rule=f"known are {', '.join(restore)}"
        )
    return restore[mark]()
