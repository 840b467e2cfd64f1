"""Whether the learning rate has come to 0 for good: a schedule that is stepped too often, or is too short."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from harness.stability.audits.base import Audit, Found, Scene

__all__ = ["RateAudit"]

MIN_STEPS = 33
"""Of three looks; the last step of a schedule may well be at 0."""


class RateAudit(Audit):
    """The rates of all groups were positive and are 0 in step after step: nothing is learned any more. A rate
    that lies on the device is not read."""

    name = "rate"
    remedy = "look at how long the schedule is, and whether it is stepped once for each step of the optimizer"

    def __init__(self) -> None:
        self._was_positive, self._num_steps = False, 0

    def before_update(self, scene: Scene) -> None:
        groups = [group for optimizer in scene.optimizers.unwrapped for group in optimizer.param_groups]
        has_rate = any(isinstance(rate := group.get("lr", 1.0), Tensor) or rate != 0 for group in groups)
        self._was_positive = self._was_positive or has_rate
        self._num_steps = 0 if has_rate or not self._was_positive else self._num_steps + 1

    def look(self, scene: Scene) -> Iterable[Found]:
        if self._num_steps >= MIN_STEPS:
            yield Found(value=self._num_steps)

    def words(self, value: int, parameter: str | None) -> str:
        return f"the learning rate has been 0 for {value} steps: nothing is learned any more"

    def forget(self) -> None:
        self._num_steps = 0
