"""Whether gradients are cleared between steps, told by torch's version counters.

A gradient into which a backward pass adds, and that is the very tensor that the last step left, unwritten
since, was cleared by nobody. `zero_grad` leaves none, or has written zeros.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from harness.stability.audits.base import Audit, Found, Scene
from harness.stability.layout import Layout

__all__ = ["ClearedAudit"]

NUM_WATCHED = 8
"""Parameters that are looked at, evenly spaced."""

MIN_STEPS = 2
"""Steps from which it is no accident."""


class _Watched:
    """One parameter's gradient, from step to step."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self._parameter = weakref.ref(parameter)
        self._left: tuple[weakref.ref[Tensor], int] | None = None
        """The gradient that the last step left, and its version."""
        self._num_begun, self._is_stale = 0, False
        self.num_stale = 0
        self._handle: RemovableHandle | None = None
        self._node = None
        if not isinstance(parameter, DTensor) and parameter.requires_grad:
            self._node = get_gradient_edge(parameter).node
            see: Callable[..., Any] = partial(_begin, weakref.WeakMethod(self.begin))
            self._handle = self._node.register_prehook(see)

    def begin(self) -> None:
        """A backward pass is about to add to it."""
        # Each pass so far has written once; whatever else was written may have been zeros.
        unwritten = self._is_as_left(num_writes=self._num_begun)
        self._is_stale = unwritten and (self._is_stale or not self._num_begun)
        self._num_begun += 1

    def end(self) -> None:
        """The step is about to be made."""
        parameter = self._parameter()
        gradient = None if parameter is None else parameter.grad
        same = self._left is not None and gradient is not None and self._left[0]() is gradient
        # A discriminator's gradient grows in the generator's backward pass, and is cleared afterwards.
        self.num_stale += int(self._is_stale and same)

    def leave(self) -> None:
        """The step was made."""
        parameter = self._parameter()
        gradient = None if parameter is None else parameter.grad
        self._left = None if gradient is None else (weakref.ref(gradient), gradient._version)
        self._num_begun, self._is_stale = 0, False

    def close(self) -> None:
        if self._handle is not None:
            self._handle.remove()

    def _is_as_left(self, *, num_writes: int) -> bool:
        parameter = self._parameter()
        if self._left is None or parameter is None or parameter.grad is None:
            return False
        left, version = self._left
        return left() is parameter.grad and parameter.grad._version == version + num_writes


class ClearedAudit(Audit):
    """Gradients of every step are added to those of the steps before."""

    name = "cleared"
    remedy = "call zero_grad() of this model or of its own optimizers once after each step"

    def __init__(self) -> None:
        self._layout: Layout | None = None
        self._watched: dict[int, _Watched] = {}
        """By row."""

    def before_update(self, scene: Scene) -> None:
        for one in self._watched.values():
            one.end()

    def after_update(self, scene: Scene) -> None:
        if self._layout is not scene.layout:
            self.close()
            self._layout = scene.layout
            chosen = range(0, len(scene.layout), max(1, len(scene.layout) // NUM_WATCHED))
            self._watched = {row: _Watched(scene.layout.parameters[row]) for row in chosen}
        for one in self._watched.values():
            one.leave()

    def look(self, scene: Scene) -> Iterable[Found]:
        for row, one in self._watched.items():
            if one.num_stale >= MIN_STEPS and self._layout is scene.layout:
                yield Found(row, one.num_stale)
                return

    def words(self, value: int, parameter: str | None) -> str:
        return f"the gradient of {parameter} was not cleared before {value} steps, and still holds older ones"

    def unseen(self, scene: Scene) -> str | None:
        sharded = any(isinstance(parameter, DTensor) for parameter in scene.layout.parameters)
        return "FSDP2 adds to shards, and zeroes them, where no version is counted" if sharded else None

    def forget(self) -> None:
        for one in self._watched.values():
            one.num_stale = 0
            one.leave()

    def close(self) -> None:
        for one in self._watched.values():
            one.close()
        self._watched, self._layout = {}, None


def _begin(method: weakref.WeakMethod[Callable[[], None]], gradients: object) -> None:
    begin = method()
    if begin is not None:
        begin()
