"""What a step finds in parameters and optimizer state, copied, so that the step can be taken back.

On the device, by a verdict that nobody reads: values are selected, never scaled, because 0 x NaN is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Muon

from harness.dist import local_part
from harness.stability.layout import NUM_INF, NUM_NAN, Layout
from harness.stability.statistics import tensor_statistics

__all__ = [
    "UPDATE",
    "WEIGHTS",
    "Before",
    "is_undone",
    "not_finite",
    "share_bytes",
    "step_selected",
    "weights_not_finite",
]

UPDATE = "update"
"""Name of what the ranks have said of an update, `[W, 2]`: what `not_finite` gave on each."""

WEIGHTS = "weights"
"""The same of the weights, looked at after a step whose loss was not finite."""

CHUNK_BYTES = 256 << 20
"""Of parameters and state that are copied at once, where a copy of all of them is not needed."""

MEASURED = (torch.float32, torch.bfloat16, torch.float16)

PLAIN = (Tensor, nn.Parameter)
"""Other classes (quantised weights and moments) may have no memory of the dtype that they report."""


class Before:
    """Copies of what a step of one optimizer may change: the parameters that have a gradient, their state and
    what the groups hold: tensors and numbers, in nested lists, tuples and dictionaries too.

    Takes the memory of these parameters and their state while it lives. Does not synchronise.

    Args:
        among: Of these parameters only, by `id`; None: of all.

    Raises:
        NotImplementedError: a tensor of a class that cannot be copied.
    """

    def __init__(self, optimizer: Any, among: Collection[int] | None = None) -> None:
        self.optimizer = optimizer
        self.parameters: list[nn.Parameter] = [
            p
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None and (among is None or id(p) in among)
        ]
        # Containers of its own: which tensors stood there, for an optimizer may put others in their place.
        self._states = [_items(dict(_state_of(optimizer, p))) for p in self.parameters]
        self._groups = [_items({k: v for k, v in g.items() if k != "params"}) for g in optimizer.param_groups]
        held = [*self.parameters, *_tensors(self._states), *_tensors(self._groups)]
        parts = [part for tensor in held for part in _parts(tensor)]
        pairs = [_with_room(part.detach()) for part in parts]
        self._copies = {id(part): copy for part, (_, copy) in zip(parts, pairs, strict=True)}
        self._pairs = _alike(pairs)
        for lives, copies in self._pairs:
            _copy(lives, copies)

    @property
    def size_bytes(self) -> int:
        """Of the copies."""
        return sum(copy.nbytes for copy in self._copies.values())

    def select(self, undo_t: Tensor) -> None:
        """Puts everything back if `undo_t`, 0-d bool on the device. Only where the step made no state, and
        moved no number. Does not synchronise."""
        for parameter, before in zip(self.parameters, self._states, strict=True):
            self._hold_in_place(_state_of(self.optimizer, parameter), before)
        for lives, copies in self._pairs:
            if lives[0].device != undo_t.device:
                continue  # numbers in tensors on the host, a rate say
            # Into the copies, then one kernel for all of them back: `where` has no form for lists.
            for live, copy in zip(lives, copies, strict=True):
                torch.where(undo_t, copy, live, out=copy)
            _copy(copies, lives)

    def put_back(self) -> None:
        """Puts everything back; what the step has added to the state is taken out again."""
        for lives, copies in self._pairs:
            _copy(copies, lives)
        for parameter, before in zip(self.parameters, self._states, strict=True):
            state = _state_of(self.optimizer, parameter)
            for key in [key for key in state if key not in before]:
                del state[key]
            state.update(before)
            if not before:  # there was no entry, and the number of entries is looked at
                getattr(self.optimizer, "state", {}).pop(parameter, None)
        for group, before in zip(self.optimizer.param_groups, self._groups, strict=True):
            group.update(before)

    def _hold_in_place(self, state: dict[str, Any], before: dict[str, Any]) -> None:
        """Moves what stands in the state now into the tensors that stood there."""
        for key, tensor in before.items():
            if isinstance(tensor, Tensor) and state[key] is not tensor:
                local_part(tensor).copy_(local_part(state[key]))
                state[key] = tensor

    def moved(self) -> Iterator[_Moved]:
        """What has to be finite of each parameter now: itself, and the moments that are of its shape."""
        for parameter, before in zip(self.parameters, self._states, strict=True):
            yield _Moved(parameter, local_part(parameter), self._copy_of(parameter))
            for key, value in _state_of(self.optimizer, parameter).items():
                if isinstance(value, Tensor) and value.shape == parameter.shape and value.dtype in MEASURED:
                    yield _Moved(parameter, local_part(value), self._copy_of(before.get(key)))

    def _copy_of(self, value: object) -> Tensor | None:
        return self._copies.get(id(local_part(value))) if isinstance(value, Tensor) else None


class _Moved(NamedTuple):
    """This rank's part of a tensor that a step may have moved."""

    parameter: nn.Parameter
    """Whose it is."""
    now: Tensor
    before: Tensor | None
    """None: there was none, or it is not known."""


def is_undone(optimizer: Any, undo: str) -> bool:
    """Whether updates are taken back that are not finite, under this `guard.undo`. By the class, which is the
    same on all ranks. Muon's iteration may diverge for a finite gradient."""
    return undo == "always" or (undo == "auto" and isinstance(optimizer, Muon))


def share_bytes(optimizer: Any) -> int:
    """Of the largest share of its parameters that a rank holds; equal on all ranks."""
    return sum(-(-p.nbytes // _num_shards(p)) for group in optimizer.param_groups for p in group["params"])


def not_finite(before: Sequence[Before], layout: Layout) -> Tensor:
    """`[2]` float64 on the device: how many parameters are not finite now, themselves or their moments, where
    they were before, on this rank; and the row of the first; -1: none. Does not synchronise."""
    return _first_bad([moved for each in before for moved in each.moved()], layout)


def weights_not_finite(layout: Layout, parts: Sequence[Tensor] | None = None) -> Tensor:
    """The same of the weights alone, of all parameters of the layout, whatever they were before; or of
    `parts`, one of each."""
    found = [local_part(p) for p in layout.parameters] if parts is None else parts
    moved = [_Moved(p, now, None) for p, now in zip(layout.parameters, found, strict=True)]
    return _first_bad(moved, layout)


def _first_bad(moved: Sequence[_Moved], layout: Layout) -> Tensor:
    device = layout.parameters[0].device
    moved = [one for one in moved if type(one.now) in PLAIN and one.now.device == one.parameter.device]
    if not moved:
        return torch.tensor([0.0, -1.0], dtype=torch.float64).to(device)
    rows = torch.tensor([layout.row_of[id(one.parameter)] for one in moved], pin_memory=device.type == "cuda")
    rows = rows.to(device, non_blocking=True)
    # Added up by row, as a parameter comes more than once (itself, its moments); `argmax` is the first row.
    bad = torch.zeros(len(layout), dtype=torch.float64, device=device)
    bad.index_add_(0, rows, _num_newly_bad(moved))
    is_bad = bad > 0
    first = torch.where(is_bad.any(), is_bad.double().argmax(), -1)
    return torch.stack([is_bad.sum().double(), first.double()])


def _num_newly_bad(moved: Sequence[_Moved]) -> Tensor:
    """`[n]` float64: how many more NaN and Inf there are than before. A mask's -inf is there on purpose."""
    now = _num_bad([one.now.detach() for one in moved])
    if _is_known_good(now) or all(one.before is None for one in moved):
        return now
    before = [one.now.detach().new_empty(0) if one.before is None else one.before for one in moved]
    return (now - _num_bad(before)).clamp(min=0)


def _is_known_good(num_bad: Tensor) -> bool:
    """Whether nothing is bad, where that is read for nothing: on the CPU."""
    return num_bad.device.type == "cpu" and not num_bad.any()


def step_selected(optimizer: Any, skip_t: Tensor) -> None:
    """Steps some parameters after the others, and takes it back for each of them if `skip_t`: in memory that
    is bounded, without a read on the host."""
    for chunk in _chunks(optimizer):
        before = Before(optimizer, among=chunk)
        with _holding_only(optimizer, chunk):
            optimizer.step()
        before.select(skip_t)


def _num_bad(tensors: Sequence[Tensor]) -> Tensor:
    """`[n]` float64: NaN and Inf in each."""
    if all(one.dtype in MEASURED for one in tensors):
        rows = tensor_statistics(tensors, extremes=False)
        return rows[:, NUM_NAN] + rows[:, NUM_INF]
    return torch.stack([(~one.isfinite()).sum().double() for one in tensors])


def _having_gradient(optimizer: Any) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _chunks(optimizer: Any) -> Iterator[set[int]]:
    chunk: set[int] = set()
    taken = 0
    for parameter in _having_gradient(optimizer):
        size = _size_bytes(optimizer, parameter)
        if chunk and taken + size > CHUNK_BYTES:
            yield chunk
            chunk, taken = set(), 0
        chunk.add(id(parameter))
        taken += size
    if chunk:
        yield chunk


def _size_bytes(optimizer: Any, parameter: nn.Parameter) -> int:
    held = [parameter, *_state_of(optimizer, parameter).values()]
    return sum(local_part(one).nbytes for one in held if isinstance(one, Tensor))


@contextmanager
def _holding_only(optimizer: Any, chunk: Collection[int]) -> Iterator[None]:
    """Within it the optimizer's groups hold these parameters alone."""
    lists = [group["params"] for group in optimizer.param_groups]
    try:
        for group, held in zip(optimizer.param_groups, lists, strict=True):
            group["params"] = [p for p in held if id(p) in chunk]
        yield
    finally:
        for group, held in zip(optimizer.param_groups, lists, strict=True):
            group["params"] = held


def _state_of(optimizer: Any, parameter: nn.Parameter) -> dict[str, Any]:
    state = getattr(optimizer, "state", {}).get(parameter)
    return state if isinstance(state, dict) else {}


def _items(value: Any) -> Any:
    """The same in lists, tuples and dictionaries of its own."""
    kind = type(value)
    if kind is dict:
        return {key: _items(one) for key, one in value.items()}
    return kind(map(_items, value)) if kind in (list, tuple) else value


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one)


def _num_shards(parameter: nn.Parameter) -> int:
    if not isinstance(parameter, DTensor):
        return 1
    placed = enumerate(parameter.placements)
    return math.prod(parameter.device_mesh.size(axis) for axis, where in placed if where.is_shard())


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """What lies in memory of a tensor on this rank: of a DTensor its share, of a quantised one several."""
    local = local_part(tensor)
    if type(local) in PLAIN or not hasattr(local, "__tensor_flatten__"):
        yield local
        return
    for name in local.__tensor_flatten__()[0]:
        yield from _parts(getattr(local, name))


def _with_room(live: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor and one for its copy. Not every class knows `empty_like`."""
    return live, torch.empty_like(live) if type(live) in PLAIN else live.clone()


def _alike(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Pairs in lists of one class, device and dtype each: mixed ones torch copies one by one."""
    groups: dict[object, tuple[list[Tensor], list[Tensor]]] = {}
    for live, copy in pairs:
        lives, copies = groups.setdefault((type(live), live.device, live.dtype), ([], []))
        lives.append(live)
        copies.append(copy)
    return list(groups.values())


def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    if type(targets[0]) in PLAIN:
        torch._foreach_copy_(targets, sources)
    else:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)
