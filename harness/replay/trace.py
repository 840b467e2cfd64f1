"""Finds the operation in which a NaN or an Inf began: watches every ATen operation, forward and backward.

Each operation that leaves something non-finite is noted with the operations from which its non-finite inputs
came. From what is bad in the end, the loss or a gradient, one goes back along these until an operation has
finite inputs: that is the producer, and those on the way are propagators. What is non-finite and reaches
neither loss nor gradient, such as the -inf of a mask, is on no such way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness.replay.places import Place, here, module_names

__all__ = ["Operation", "TensorNote", "Tracer"]

_OVERWRITE = {"copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "random_", "exponential_"}
"""In-place operations that do not read what they write to."""
_EMPTY = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "empty_permuted"}
"""Operations that leave memory as it is."""
Usual = Set[tuple[str, str | None, str]]
"""Keys of operations."""
MOST_OPERATIONS = 100_000
"""Non-finite ones that are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorNote:
    """A tensor in numbers. Extremes are over the finite elements."""

    shape: tuple[int, ...]
    dtype: str
    smallest: float
    largest: float
    num_nan: int
    num_inf: int
    num_zero: int

    @classmethod
    def of(cls, tensor: Tensor) -> TensorNote:
        """Reads the tensor: synchronises."""
        values = tensor.detach().float() if tensor.dtype != torch.float64 else tensor.detach()
        finite = values[values.isfinite()]
        return cls(
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            smallest=float(finite.min()) if finite.numel() else math.nan,
            largest=float(finite.max()) if finite.numel() else math.nan,
            num_nan=int(values.isnan().sum()),
            num_inf=int(values.isinf().sum()),
            num_zero=int((values == 0).sum()),
        )


@dataclass(slots=True, kw_only=True, eq=False)
class Operation:
    """An operation that left something non-finite."""

    number: int
    """Of all operations of the pass, in order."""
    name: str
    """ATen's: `aten.log.default`."""
    direction: str
    """forward or backward."""
    place: Place
    forward_name: str | None
    """In a backward pass: the operation whose derivative this is a part of."""
    parameter: str | None
    """In a hook of a parameter's gradient: whose."""
    output: TensorNote
    inputs: list[TensorNote] = field(default_factory=list)
    """Floating-point ones, of a producer."""
    nan_from: list[Operation | str] = field(default_factory=list)
    """Where the inputs with a NaN come from: operations, or what was there before (`parameter head.bias`)."""
    inf_from: list[Operation | str] = field(default_factory=list)
    """The same of inputs with an Inf and no NaN."""
    has_constant: bool = False
    """A NaN or Inf is among its plain numbers, or in a tensor that no operation has made."""

    @property
    def key(self) -> tuple[str, str | None, str]:
        """The same for the same operation of another pass."""
        return self.name, self.place.module, str(self.place)

    @property
    def is_empty(self) -> bool:
        """It hands out memory and writes nothing: what is bad there was never written by anybody."""
        return self.name.split(".")[1] in _EMPTY

    @property
    def makes(self) -> str:
        """NaN or Inf."""
        return "NaN" if self.output.num_nan else "Inf"


Source = Operation | str
"""An operation, or what was there before by what it is called."""


class _StepBack(NamedTuple):
    source: Source | None
    """The input to go back to; None: it began here."""
    root: Source
    """Where that leads to in the end."""


@dataclass(frozen=True, slots=True)
class _Forward:
    name: str
    place: Place


class Tracer(TorchDispatchMode):
    """Within it every operation is looked at; each is waited for.

    Args:
        model: Without DDP.
        known: What is there before, by what it is called: parameters, buffers, the batch.
    """

    def __init__(self, model: nn.Module, known: Iterable[tuple[str, Tensor]]) -> None:
        super().__init__()
        self._names = module_names(model)
        self._parameters = {id(p): name for name, p in model.named_parameters()}
        self._known = {_storage(tensor): name for name, tensor in known}
        self._writers: dict[int, Operation] = {}
        """What last left something bad in a storage that holds something bad."""
        self._unwritten: dict[int, Operation] = {}
        """Memory that was handed out as it was."""
        self._used_unwritten: list[Operation] = []
        self._sound: set[int] = set()
        """Storages from before that hold nothing bad."""
        self._forward: dict[int, _Forward] = {}
        """The operations of the forward pass by the number of their autograd node."""
        self.operations: list[Operation] = []
        self.largest: dict[str, tuple[float, _Forward]] = {}
        """Largest finite activation by module."""
        self._count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        sources = self._sources(func, args, kwargs)
        output = func(*args, **kwargs)
        self._count += 1
        node: Any = torch._C._current_autograd_node()  # None outside of a backward pass
        place = here(self._names) if node is None else None
        if node is None and place is not None:
            autograd: Any = torch.autograd  # mypy misses what it takes from C
            number = autograd._get_sequence_nr() - 1
            self._forward.setdefault(number, _Forward(str(func), place))
        self._note(func, node, place, sources, args, kwargs, output)
        return output

    def way_to(self, tensors: Sequence[Tensor], *, usual: Usual) -> list[Source]:
        """From where the NaN or Inf in `tensors` began up to them: `[producer, propagator, ...]`.

        Args:
            usual: Keys of operations that leave an Inf where nothing is wrong too, as masks do.

        Returns:
            The producer first; it is a text where something was bad before the pass. Empty if nothing is bad,
            or nobody knows how it came about.
        """
        steps = self._steps_back(usual)
        ends: list[tuple[int, Source]] = []
        for tensor in tensors:
            source = self._writers.get(_storage(tensor)) or self._known.get(_storage(tensor))
            if isinstance(source, str):
                ends.append((-1, source))
            elif source is not None and id(source) in steps:
                ends.append((_number(steps[id(source)].root), source))
        way: list[Source] = []
        end = min(ends, key=lambda one: one[0])[1] if ends else None
        while end is not None:
            way.insert(0, end)
            end = None if isinstance(end, str) or id(end) not in steps else steps[id(end)].source
        return way

    def _steps_back(self, usual: Usual) -> dict[int, _StepBack]:
        """Of each operation that is not as usual, by `id`: where one goes back to from it."""
        steps: dict[int, _StepBack] = {}
        for operation in (*self._used_unwritten, *self.operations):  # they read what earlier ones left
            is_usual = operation.key in usual
            worth: list[tuple[int, Source, Source]] = []
            for sources in (operation.nan_from, operation.inf_from):
                for source in sources:
                    if isinstance(source, Operation) and id(source) in steps:
                        root = steps[id(source)].root
                        worth.append((_number(root), source, root))
                    elif isinstance(source, str) and not (is_usual and sources is operation.inf_from):
                        worth.append((-1, source, source))
                if worth:
                    break
            if worth:
                _, source, root = min(worth, key=lambda one: one[0])
                steps[id(operation)] = _StepBack(source, root)
            elif operation.output.num_nan or not is_usual:
                steps[id(operation)] = _StepBack(None, operation)
        return steps

    def _sources(self, func: Any, args: Any, kwargs: Any) -> list[tuple[Tensor, Operation | str]]:
        """The inputs that hold something bad, and where it comes from."""
        found = []
        for tensor in self._read(func, args, kwargs):
            if not tensor.is_floating_point() or not tensor.numel():
                continue
            storage = _storage(tensor)
            if storage in self._sound and storage not in self._unwritten:
                continue
            if storage in self._writers or storage in self._unwritten or storage in self._known:
                if not _is_finite(tensor):
                    source = self._writers.get(storage) or self._known.get(storage)
                    found.append((tensor, source or self._handed_out(storage)))
                elif storage in self._known:
                    self._sound.add(storage)
                continue
            # What else is bad is a constant, made before or outside of torch: who reads it brings it in.
            self._sound.add(storage)
        return found

    def _handed_out(self, storage: int) -> Operation:
        """The operation that handed out memory in which something bad was found."""
        operation = self._unwritten[storage]
        if operation not in self._used_unwritten:
            self._used_unwritten.append(operation)
        return operation

    def _read(self, func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
        """The tensors that an operation reads."""
        overwrites = func.__name__.partition(".")[0] in _OVERWRITE
        for position, argument in enumerate(func._schema.arguments):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if is_written and (overwrites or argument.is_out):
                continue
            yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))

    def _note(
        self,
        func: Any,
        node: Any,
        place: Place | None,
        sources: list[tuple[Tensor, Operation | str]],
        args: Any,
        kwargs: Any,
        output: Any,
    ) -> None:
        name = func.__name__.partition(".")[0]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        seen = set(map(_storage, inputs))
        written = _written(func, args, kwargs)
        left = {id(leaf): leaf for leaf in tree_leaves(output) if _storage_or_none(leaf) not in seen}
        for tensor in (*left.values(), *written):
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or not tensor.numel():
                continue
            storage = _storage(tensor)
            if name in _EMPTY:
                self._forget(storage)
                self._unwritten[storage] = self._operation(func, node, place, [], [], tensor, constant=False)
                continue
            if storage not in seen:
                self._forget(storage)
            largest = float(tensor.detach().abs().amax())
            if math.isfinite(largest):
                self._note_largest(node, place, func, largest)
                if storage not in seen:
                    self._sound.add(storage)
                continue
            constant = not sources and any(map(_is_bad_constant, tree_leaves((args, kwargs))))
            is_passed_on = any(bool(tensor.isnan().any()) for tensor, _ in sources)
            notes = [] if is_passed_on else [t for t in inputs if t.is_floating_point()]
            operation = self._operation(func, node, place, sources, notes, tensor, constant=constant)
            self._writers[storage] = operation
            self._sound.discard(storage)
            if len(self.operations) < MOST_OPERATIONS:
                self.operations.append(operation)

    def _forget(self, storage: int) -> None:
        """Memory that is handed out anew."""
        self._writers.pop(storage, None)
        self._unwritten.pop(storage, None)
        self._known.pop(storage, None)
        self._sound.discard(storage)

    def _operation(
        self,
        func: Any,
        node: Any,
        place: Place | None,
        sources: list[tuple[Tensor, Operation | str]],
        inputs: list[Tensor],
        output: Tensor,
        *,
        constant: bool,
    ) -> Operation:
        with_nan = [source for tensor, source in sources if bool(tensor.isnan().any())]
        forward = None
        parameter = None
        if node is not None:
            own = here(self._names)
            forward = self._forward.get(node._sequence_nr())
            variable = getattr(node, "variable", None)
            parameter = self._parameters.get(id(variable)) if variable is not None else None
            place = own if own.file is not None or forward is None else forward.place
            if place.module is None:
                module = forward.place.module if forward else parameter and parameter.rpartition(".")[0]
                kind = forward.place.module_type if forward else None
                place = Place(module=module, module_type=kind, file=place.file, line=place.line)
        assert place is not None
        return Operation(
            number=self._count,
            name=str(func),
            direction="forward" if node is None else "backward",
            place=place,
            forward_name=None if forward is None else forward.name,
            parameter=parameter,
            output=TensorNote.of(output),
            inputs=[TensorNote.of(tensor) for tensor in inputs],
            nan_from=with_nan,
            inf_from=[source for _, source in sources if source not in with_nan],
            has_constant=constant,
        )

    def _note_largest(self, node: Any, place: Place | None, func: Any, largest: float) -> None:
        if node is not None or place is None or place.module is None:
            return
        if largest > self.largest.get(place.module, (-1.0, None))[0]:
            self.largest[place.module] = largest, _Forward(str(func), place)


def _number(source: Source) -> int:
    """What was there before comes first, then what happened first."""
    return -1 if isinstance(source, str) else source.number


def _storage(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse ones have none
        return id(tensor)


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.detach().isfinite().all())


def _is_bad_constant(leaf: Any) -> bool:
    if isinstance(leaf, Tensor):
        return leaf.is_floating_point() and not _is_finite(leaf)
    return isinstance(leaf, float) and not math.isfinite(leaf)


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that an operation writes to; what else shares memory with an argument is a view."""
    found = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            found += [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return found


def _storage_or_none(leaf: Any) -> int | None:
    return _storage(leaf) if isinstance(leaf, Tensor) else None
