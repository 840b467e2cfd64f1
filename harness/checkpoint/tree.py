"""State as JSON with holes: every tensor is replaced by its name, and the rest is plain data.

So nothing has to be pickled. Lists and dictionaries with string keys stand for themselves; what JSON does
not know is an object with one key that begins with `$`. What is saved comes back equal and of the same type;
what would not, as an instance of a class of one's own, is refused. Two things only are lost: a parameter
outside of a module comes back as a tensor, and one object in two places (tensors apart) as two.
"""

from __future__ import annotations

import base64
import math
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
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


_FACTORIES = {kind.__name__: kind for kind in (bool, dict, float, int, list, set, str, tuple)}
"""What a defaultdict may make its values with."""

_LARGEST_INT = 2**63


class _Flattener:
    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self._names = {id(tensor): name for name, tensor in tensors.items()}

    def describe(self, value: Any, name: str) -> Json:
        # Exact types: an instance of a subclass would come back as one of its base.
        if value is None or type(value) in (bool, str):
            return value
        if isinstance(value, torch.Tensor):
            return {"$tensor": self._add(_plain_tensor(value, name), name)}
        if type(value) in _SCALARS:
            return _SCALARS[type(value)](value)
        if type(value) in _CONTAINERS:
            return _CONTAINERS[type(value)](self, value, name)
        if isinstance(value, np.generic) and _is_portable(value.dtype):
            return {"$number": [value.dtype.str, base64.b64encode(value.tobytes()).decode()]}
        raise _cannot(value, name)

    def mapping(self, value: Mapping[Any, Any], name: str) -> Json:
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: self.describe(item, f"{name}/{key}") for key, item in value.items()}
        pairs = [
            [self.describe(key, f"{name}/key"), self.describe(item, f"{name}/{key}")]
            for key, item in value.items()
        ]
        return {"$dict": pairs}

    def items(self, items: Iterable[Any], name: str) -> list[Json]:
        return [self.describe(item, f"{name}/{index}") for index, item in enumerate(items)]

    def factory(self, value: defaultdict[Any, Any], name: str) -> Json:
        make = value.default_factory
        if make is not None and make not in _FACTORIES.values():
            raise CheckpointError(
                f"{name} is a defaultdict that makes values by {make!r}",
                rule=f"functions are not saved, only the names of {', '.join(_FACTORIES)}",
                remedy="let state_dict() return dict(...) of it",
            )
        return {"$defaultdict": [make and make.__name__, self.mapping(value, name)]}

    def array(self, value: np.ndarray[Any, Any], name: str) -> Json:
        if not _is_portable(value.dtype):
            raise _cannot(value, name)
        if value.dtype.isnative and value.dtype.kind in "biufc":
            return {"$array": self._add(torch.from_numpy(value.copy()), name)}
        raw = torch.frombuffer(bytearray(value.tobytes()) or bytearray(1), dtype=torch.uint8)
        return {"$raw_array": [value.dtype.str, list(value.shape), {"$tensor": self._add(raw, name)}]}

    def _add(self, tensor: torch.Tensor, name: str) -> str:
        known = self._names.get(id(tensor))
        if known is not None:
            return known
        while name in self._tensors:
            name += "~"
        self._tensors[name] = tensor
        self._names[id(tensor)] = name
        return name


_CONTAINERS: Mapping[type, Callable[[_Flattener, Any, str], Json]] = {
    dict: _Flattener.mapping,
    list: _Flattener.items,
    tuple: lambda to, value, name: {"$tuple": to.items(value, name)},
    set: lambda to, value, name: {"$set": to.items(value, name)},
    frozenset: lambda to, value, name: {"$frozenset": to.items(value, name)},
    deque: lambda to, value, name: {"$deque": [value.maxlen, to.items(value, name)]},
    OrderedDict: lambda to, value, name: {"$OrderedDict": to.mapping(value, name)},
    Counter: lambda to, value, name: {"$Counter": to.mapping(value, name)},
    defaultdict: _Flattener.factory,
    np.ndarray: _Flattener.array,
}


def _int(value: int) -> Json:
    # Python reads no decimal number of more than 4,300 digits, and other readers of JSON none of 64 bits.
    return value if -_LARGEST_INT <= value < _LARGEST_INT else {"$int": hex(value)}


def _float(value: float) -> Json:
    if math.isfinite(value):
        return value
    bits = struct.pack(">d", value).hex()
    return {"$float": str(value)} if bits == struct.pack(">d", float(str(value))).hex() else {"$bits": bits}


_SCALARS: Mapping[type, Callable[[Any], Json]] = {
    int: _int,
    float: _float,
    complex: lambda value: {"$complex": [_float(value.real), _float(value.imag)]},
    bytes: lambda value: {"$bytes": base64.b64encode(value).decode()},
    bytearray: lambda value: {"$bytearray": base64.b64encode(value).decode()},
    torch.Size: lambda value: {"$size": list(value)},
    torch.dtype: lambda value: {"$dtype": str(value).removeprefix("torch.")},
    torch.device: lambda value: {"$device": str(value)},
}


def _is_portable(dtype: np.dtype[Any]) -> bool:
    """Whether the bytes mean the same everywhere; those of a long double do not."""
    return dtype.kind in "biufcmM" and dtype.char not in "gG"


def _plain_tensor(tensor: torch.Tensor, name: str) -> torch.Tensor:
    kinds = {"sparse": tensor.layout != torch.strided, "quantized": tensor.is_quantized}
    kinds |= {"nested": tensor.is_nested, "without data (meta)": tensor.is_meta}
    wrong = [kind for kind, it_is in kinds.items() if it_is]
    if wrong:
        raise CheckpointError(
            f"{name} is a tensor that is {wrong[0]}, which cannot be saved",
            rule="tensors are saved element by element",
            remedy="let state_dict() return the dense tensors that it consists of",
        )
    return tensor.resolve_conj().resolve_neg() if tensor.is_conj() or tensor.is_neg() else tensor


def _cannot(value: Any, name: str) -> CheckpointError:
    kind = (
        f"{type(value).__qualname__} of {value.dtype}"
        if hasattr(value, "dtype")
        else type(value).__qualname__
    )
    return CheckpointError(
        f"{name} is a {kind}, which cannot be saved",
        rule="state consists of tensors, numbers, numeric arrays, strings, bytes, lists, tuples, sets, "
        "dictionaries and those of collections; other classes would have to be unpickled",
        remedy="let state_dict() return these, and load_state_dict() make the object from them",
    )


def _unmark(mark: str, content: Json, tensors: Mapping[str, torch.Tensor]) -> Any:
    def filled() -> Any:
        return fill(content, tensors)

    restore: dict[str, Callable[[], Any]] = {
        "$tensor": lambda: tensors[content],
        "$array": lambda: tensors[content].numpy(),
        "$raw_array": lambda: _raw_array(*filled()),
        "$number": lambda: np.frombuffer(base64.b64decode(content[1]), _dtype(content[0]))[0],
        "$tuple": lambda: tuple(filled()),
        "$set": lambda: set(filled()),
        "$frozenset": lambda: frozenset(filled()),
        "$deque": lambda: deque(fill(content[1], tensors), maxlen=content[0]),
        "$int": lambda: int(content, 16),
        "$float": lambda: float(content),
        "$bits": lambda: struct.unpack(">d", bytes.fromhex(content))[0],
        "$complex": lambda: complex(*filled()),
        "$bytes": lambda: base64.b64decode(content),
        "$bytearray": lambda: bytearray(base64.b64decode(content)),
        "$dict": lambda: {fill(key, tensors): fill(item, tensors) for key, item in content},
        "$OrderedDict": lambda: OrderedDict(filled()),
        "$Counter": lambda: Counter(filled()),
        "$defaultdict": lambda: defaultdict(content[0] and _FACTORIES[content[0]], fill(content[1], tensors)),
        "$size": lambda: torch.Size(content),
        "$dtype": lambda: _torch_dtype(content),
        "$device": lambda: torch.device(content),
    }
    if mark not in restore:
        raise CheckpointError(
            f"the checkpoint's description holds {mark!r}", rule=f"known are {', '.join(restore)}"
        )
    return restore[mark]()


def _raw_array(dtype: str, shape: list[int], raw: torch.Tensor) -> np.ndarray[Any, Any]:
    count = math.prod(shape)
    return np.frombuffer(raw.numpy().tobytes(), _dtype(dtype), count=count).reshape(shape).copy()


def _dtype(name: str) -> np.dtype[Any]:
    dtype = np.dtype(name)
    if not _is_portable(dtype):
        raise CheckpointError(f"the checkpoint's description holds the dtype {name!r}")
    return dtype


def _torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"the checkpoint's description holds the dtype {name!r}, unknown to this torch")
    return dtype
