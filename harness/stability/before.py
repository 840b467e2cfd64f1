"""What a step finds in parameters and optimizer state, copied, so that the step can be taken back.

On the device, by a verdict that nobody reads: values are selected, never scaled, because 0 x NaN is NaN.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from harness.dist import local_part
from harness.stability.layout import NUM_INF, NUM_NAN, Layout
from harness.stability.statistics import tensor_statistics

__all__ = ["UPDATE", "WEIGHTS", "Before", "not_finite", "size_bytes", "step_selected", "weights_not_finite"]

UPDATE = "update"
"""Name of what the ranks have said of an update, `[W, 2]`: what `not_finite` gave on each."""

WEIGHTS = "weights"
"""The same of the weights, looked at after a step whose loss was not finite."""

CHUNK_BYTES = 256 << 20
"""Of parameters and state that are copied at once, where a copy of all of them is not needed."""

MEASURED = (torch.float32, torch.bfloat16, torch.float16)


class Before:
    """Copies of what a step of one optimizer may change: the parameters that have a gradient, and of their
    state every tensor and number; of the groups every number.

    Takes the memory of these parameters and their state while it lives. Does not synchronise.

    Args:
        among: Of these parameters only, by `id`; None: of all.
    """

    def __init__(self, optimizer: Any, among: Collection[int] | None = None) -> None:
        self.optimizer = optimizer
        self.parameters: list[nn.Parameter] = [
            p
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None and (among is None or id(p) in among)
        ]
        # Shallow: which tensors stood there, for an optimizer may put others in their place.
        self._states = [dict(_state_of(optimizer, p)) for p in self.parameters]
        self._groups = [{k: v for k, v in g.items() if _is_number(v)} for g in optimizer.param_groups]
        tensors = [value for state in self._states for value in state.values() if isinstance(value, Tensor)]
        self._live = [local_part(tensor).detach() for tensor in (*self.parameters, *tensors)]
        self._copies = [torch.empty_like(one) for one in self._live]
        _copy(self._live, self._copies)

    def select(self, undo_t: Tensor) -> None:
        """Puts everything back if `undo_t`, 0-d bool on the device. Only where the step made no state, and
        moved no number. Does not synchronise."""
        for parameter, before in zip(self.parameters, self._states, strict=True):
            self._hold_in_place(_state_of(self.optimizer, parameter), before)
        # Into the copies, then one kernel for all of them back: `where` has no form for lists.
        for live, copy in zip(self._live, self._copies, strict=True):
            torch.where(undo_t, copy, live, out=copy)
        _copy(self._copies, self._live)

    def put_back(self) -> None:
        """Puts everything back; what the step has added to the state is taken out again."""
        _copy(self._copies, self._live)
        for parameter, before in zip(self.parameters, self._states, strict=True):
            state = _state_of(self.optimizer, parameter)
            for key in [key for key in state if key not in before]:
                del state[key]
            state.update(before)
            if not before:  # there was no entry, and the number of entries is looked at
                getattr(self.optimizer, "state", {}).pop(parameter, None)
        for group, numbers in zip(self.optimizer.param_groups, self._groups, strict=True):
            group.update(numbers)

    def _hold_in_place(self, state: dict[str, Any], before: dict[str, Any]) -> None:
        """Moves what stands in the state now into the tensors that stood there."""
        for key, tensor in before.items():
            if isinstance(tensor, Tensor) and state[key] is not tensor:
                local_part(tensor).copy_(local_part(state[key]))
                state[key] = tensor

    def moved(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter with what has to be finite of it now: itself, and the moments that are of its
        shape."""
        for parameter in self.parameters:
            yield parameter, local_part(parameter).detach()
            for value in _state_of(self.optimizer, parameter).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape and value.dtype in MEASURED:
                    yield parameter, local_part(value).detach()


def not_finite(before: Sequence[Before], layout: Layout) -> Tensor:
    """`[2]` float64 on the device: how many parameters are not finite now, themselves or their moments, on
    this rank, and the row of the first; -1: none. Does not synchronise."""
    return _first_bad([pair for each in before for pair in each.moved()], layout)


def weights_not_finite(layout: Layout) -> Tensor:
    """The same of the weights alone, of all parameters of the layout."""
    return _first_bad([(p, local_part(p).detach()) for p in layout.parameters], layout)


def _first_bad(moved: Sequence[tuple[nn.Parameter, Tensor]], layout: Layout) -> Tensor:
    device = layout.parameters[0].device
    if not moved:
        return torch.tensor([0.0, -1.0], dtype=torch.float64).to(device)
    rows = torch.tensor([layout.row_of[id(p)] for p, _ in moved], pin_memory=device.type == "cuda")
    rows = rows.to(device, non_blocking=True)
    # Added up by row, as a parameter comes more than once (itself, its moments); `argmax` is the first row.
    bad = torch.zeros(len(layout), dtype=torch.float64, device=device)
    bad.index_add_(0, rows, _num_bad([one for _, one in moved]))
    is_bad = bad > 0
    first = torch.where(is_bad.any(), is_bad.double().argmax(), -1)
    return torch.stack([is_bad.sum().double(), first.double()])


def step_selected(optimizer: Any, skip_t: Tensor) -> None:
    """Steps some parameters after the others, and takes it back for each of them if `skip_t`: in memory that
    is bounded, without a read on the host."""
    for chunk in _chunks(optimizer):
        before = Before(optimizer, among=chunk)
        with _holding_only(optimizer, chunk):
            optimizer.step()
        before.select(skip_t)


def size_bytes(optimizer: Any) -> int:
    """Of the parameters that have a gradient, and of their state."""
    return sum(_size_bytes(optimizer, p) for p in _having_gradient(optimizer))


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


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    if sources:
        torch._foreach_copy_(targets, sources)
