"""Whether gradients are cleared between steps, told by torch's version counters.

A gradient into which a backward pass adds, and that is the very tensor that the last step left, unwritten
since, was cleared by nobody. `zero_grad` leaves none, or has written zeros. A write through `.data` is not
counted: where there is a suspicion, the values have to be the same too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from harness.stability.audits.base import Audit, Found, Scene
from harness.stability.checks.fingerprint import fingerprint
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
        self._kept: Tensor | None = None
        """0-d int64, the fingerprint of that one, once there is a suspicion."""
        self._num_begun, self._is_stale, self._is_suspect = 0, False, False
        self._are_same_now: Tensor | None = None
        self.num_stale = 0
        self.are_same: Tensor | None = None
        """0-d bool on the device: whether the values were as left in all of these steps."""
        self._handles: list[RemovableHandle] = []
        # Hooks of the parameter: its node in the graph, if kept, would be bound to the stream of today.
        if not isinstance(parameter, DTensor) and parameter.requires_grad:
            self._handles = [
                parameter.register_hook(partial(_call, weakref.WeakMethod(self.look))),
                parameter.register_post_accumulate_grad_hook(partial(_call, weakref.WeakMethod(self.note))),
            ]

    def look(self) -> None:
        """A backward pass is about to add to it, or only asks for its gradient."""
        if self._num_begun:
            return
        self._is_stale = self._is_as_left(num_writes=0)
        if self._is_stale and self._kept is not None:
            self._are_same_now = (self._fingerprint() == self._kept) & (self._kept != 0)

    def note(self) -> None:
        """A backward pass has added to it."""
        # Each pass so far has written once; whatever else was written may have been zeros.
        self._num_begun += 1
        self._is_stale = self._is_stale and self._is_as_left(num_writes=self._num_begun)

    def end(self) -> None:
        """The step is about to be made."""
        parameter = self._parameter()
        gradient = None if parameter is None else parameter.grad
        same = self._left is not None and gradient is not None and self._left[0]() is gradient
        # A discriminator's gradient grows in the generator's backward pass, and is cleared afterwards.
        self._is_suspect = self._is_stale and self._num_begun > 0 and same
        if self._is_suspect and self._are_same_now is not None:
            self.num_stale += 1
            before = self.are_same
            self.are_same = self._are_same_now if before is None else before & self._are_same_now

    def leave(self) -> None:
        """The step was made."""
        parameter = self._parameter()
        gradient = None if parameter is None else parameter.grad
        self._left = None if gradient is None else (weakref.ref(gradient), gradient._version)
        self._kept = self._fingerprint() if self._is_suspect and gradient is not None else None
        self._num_begun, self._is_stale, self._are_same_now = 0, False, None

    def forget(self) -> None:
        """The run goes on from another state."""
        self.num_stale, self.are_same, self._is_suspect = 0, None, False
        self.leave()

    def _fingerprint(self) -> Tensor:
        parameter = self._parameter()
        assert parameter is not None
        assert parameter.grad is not None
        with torch.no_grad():
            return fingerprint(parameter.grad)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

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

    def confirmed(self, found: Found) -> Tensor | None:
        return self._watched[found.row].are_same

    def words(self, value: int, parameter: str | None) -> str:
        return f"the gradient of {parameter} was not cleared before {value} steps, and still holds older ones"

    def unseen(self, scene: Scene) -> str | None:
        sharded = any(isinstance(parameter, DTensor) for parameter in scene.layout.parameters)
        return "FSDP2 adds to shards, and zeroes them, where no version is counted" if sharded else None

    def forget(self) -> None:
        for one in self._watched.values():
            one.forget()

    def close(self) -> None:
        for one in self._watched.values():
            one.close()
        self._watched, self._layout = {}, None


def _call(method: weakref.WeakMethod[Callable[[], None]], tensor: Tensor) -> None:
    call = method()
    if call is not None:
        call()
