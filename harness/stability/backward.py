"""Gradients that are measured while the backward pass goes on, as soon as each of them is complete."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from harness.stability.host_copy import is_capturing
from harness.stability.inert import Hook
from harness.stability.layout import Layout
from harness.stability.statistics import is_measurable, tensor_statistics

__all__ = ["BackwardStatistics"]

CPU_BYTES, CUDA_BYTES = 1 << 20, 32 << 20
"""What is measured at once: on the CPU gradients still in the cache, on CUDA enough for a launch."""


class BackwardStatistics:
    """Statistics of gradients, taken in the backward pass by a hook on each parameter: on CUDA on a stream of
    their own, for which nothing waits before `current`.

    They count as long as the gradient is the same tensor in the same memory, and torch has counted no change
    in it. A write that torch does not count (through `.data` or numpy, by a collective) is not seen.

    A gradient that several backward passes add up is measured after as many passes as the step before had,
    unless `every_pass`; after any further one it is measured again.
    """

    def __init__(self) -> None:
        self.every_pass = False
        """Whether the gradient is asked for after each backward pass."""
        self.extremes = True
        self._hooks: dict[int, RemovableHandle] = {}
        self._passes: dict[int, int] = {}
        """By parameter, backward passes in this step; those in the last one that had any."""
        self._last_passes: dict[int, int] = {}
        self._pending: list[nn.Parameter] = []
        self._pending_bytes = 0
        self._group_of: dict[int, _Group] = {}
        """By parameter, the last group in which it was measured."""
        self._stream: torch.cuda.Stream | None = None

    def watch(self, layout: Layout) -> None:
        """Has the gradients of these parameters measured, and of no others."""
        for gone in self._hooks.keys() - layout.row_of.keys():
            self._hooks.pop(gone).remove()
        for parameter in layout.parameters:
            if id(parameter) not in self._hooks and parameter.is_leaf:
                hook = Hook(self._accumulated)
                self._hooks[id(parameter)] = parameter.register_post_accumulate_grad_hook(hook)

    def current(self) -> list[tuple[Sequence[nn.Parameter], Tensor]]:
        """Groups of parameters and the statistics `[len(group), 5]` of what is in their gradients now. What
        is enqueued from here on waits for them on the device; the host does not."""
        groups = {id(group): group for group in self._group_of.values()}.values()
        found = [group for group in groups if self._is_current(group)]
        if found and self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        return [(group.parameters, group.statistics) for group in found]

    def forget(self) -> None:
        """What was measured does not count."""
        self._group_of.clear()
        self._pending, self._pending_bytes = [], 0

    def start_step(self) -> None:
        """The next backward pass begins a gradient anew."""
        self._last_passes.update(self._passes)
        self._passes.clear()
        self.forget()

    def close(self) -> None:
        for handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()
        self.forget()

    def _accumulated(self, parameter: nn.Parameter) -> None:
        """The backward pass has added to a parameter's gradient."""
        key, gradient = id(parameter), parameter.grad
        self._passes[key] = passes = self._passes.get(key, 0) + 1
        is_last = self.every_pass or passes >= self._last_passes.get(key, 1)
        if not is_last or gradient is None or not is_measurable(gradient) or is_capturing():
            return
        self._pending.append(parameter)
        self._pending_bytes += gradient.nbytes
        if self._pending_bytes >= (CUDA_BYTES if gradient.is_cuda else CPU_BYTES):
            self._measure()

    def _measure(self) -> None:
        parameters, self._pending, self._pending_bytes = self._pending, [], 0
        gradients = [p.grad for p in dict.fromkeys(parameters) if p.grad is not None]
        group = _Group(
            parameters=[p for p in dict.fromkeys(parameters) if p.grad is not None],
            gradients=[weakref.ref(gradient) for gradient in gradients],
            states=[_state(gradient) for gradient in gradients],
            statistics=self._statistics(gradients),
        )
        self._group_of.update((id(parameter), group) for parameter in group.parameters)

    @torch.no_grad()
    def _statistics(self, gradients: Sequence[Tensor]) -> Tensor:
        if not gradients[0].is_cuda:
            return tensor_statistics(gradients, extremes=self.extremes)
        device = gradients[0].device
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        # This stream's memory is used again by later work on it, which waits here for what reads it there.
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            return tensor_statistics(gradients, extremes=self.extremes)

    def _is_current(self, group: _Group) -> bool:
        return all(self._group_of.get(id(p)) is group for p in group.parameters) and group.is_unchanged()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Parameters whose gradients were measured at once."""

    parameters: Sequence[nn.Parameter]
    gradients: Sequence[weakref.ref[Tensor]]
    """Weak: one that the loop throws away shall not take memory until the next."""
    states: Sequence[tuple[int, int]]
    statistics: Tensor

    def is_unchanged(self) -> bool:
        for parameter, measured, state in zip(self.parameters, self.gradients, self.states, strict=True):
            gradient = parameter.grad
            if gradient is None or gradient is not measured() or _state(gradient) != state:
                return False
        return True


def _state(gradient: Tensor) -> tuple[int, int]:
    """What differs once torch has written to a tensor, or given it other memory."""
    return gradient._version, gradient.data_ptr()
