"""Whether an optimizer makes steps that the guard does not know of: a `step()` that was left in the loop."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor, nn

from harness.dist import local_part
from harness.stability.audits.base import Audit, Found, Scene

__all__ = ["OutsideAudit"]

MIN_STEPS = 2


class OutsideAudit(Audit):
    """The state of an optimizer is written to between two steps of the guard, in place: a step was made, with
    nothing measured, clipped or skipped. One without state (plain SGD) shows nothing."""

    name = "outside"
    remedy = "leave out the loop's own optimizer.step(): guard.step() makes it"

    def __init__(self) -> None:
        self._left: tuple[nn.Parameter, weakref.ref[Tensor], int] | None = None
        self._num_outside = 0

    def before_update(self, scene: Scene) -> None:
        if self._left is None:
            return
        _, tensor, version = self._left
        now = tensor()
        self._num_outside += int(now is not None and local_part(now)._version != version)

    def after_update(self, scene: Scene) -> None:
        self._left = None
        for parameter in scene.layout.parameters[:1]:
            # Fused optimizers count their steps and do not touch other version counters.
            for _, value in sorted(scene.optimizers.state_of(parameter).items(), reverse=True):
                if isinstance(value, Tensor):
                    self._left = (parameter, weakref.ref(value), local_part(value)._version)
                    return

    def look(self, scene: Scene) -> Iterable[Found]:
        if self._num_outside >= MIN_STEPS:
            yield Found(value=self._num_outside)

    def words(self, value: int, parameter: str | None) -> str:
        return f"the optimizer made {value} steps of its own between those of the guard"

    def unseen(self, scene: Scene) -> str | None:
        return None if self._left else "the optimizer keeps no state in which its own steps would show"

    def forget(self) -> None:
        self._left, self._num_outside = None, 0
