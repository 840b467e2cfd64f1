"""Whether the fp16 loss scale lies at its floor, where it can cure nothing any more."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.config import GuardConfig
from harness.records import Finding
from harness.stability.checks.base import Arrived, Check, Reading, StepView
from harness.stability.checks.cadence import LOOK_EVERY, is_look

__all__ = ["ScaleCheck"]

FLOOR = 1.0

MIN_STEPS = LOOK_EVERY // 2
"""Steps since the last look that have to be at the floor."""


class ScaleCheck(Check):
    """With precision float16, or the loop's own GradScaler. One small kernel a step."""

    name = "loss scale"
    every_step = True

    def __init__(self, config: GuardConfig) -> None:
        self.every = 1 if config.silent_errors == "on" else 0
        self.every_step = self.every > 0
        self._at_floor: Tensor | None = None

    def is_due(self, step: int) -> bool:
        return self.every > 0 and step > 0 and is_look(step)

    def observe(self, view: StepView) -> None:
        # Without loss scaling it is exactly 1.
        floor = FLOOR if view.precision == torch.float16 else FLOOR / 2
        at_floor = (view.loss_scale_t <= floor).long()
        self._at_floor = at_floor if self._at_floor is None else self._at_floor + at_floor

    def measure(self, view: StepView) -> Tensor | None:
        """0-d int64: steps at the floor since the last look."""
        at_floor, self._at_floor = self._at_floor, None
        return at_floor

    def read(self, numbers: Tensor, arrived: Arrived) -> Reading:
        """Of `[W]`."""
        num = int(numbers.amax())
        if num < MIN_STEPS:
            return Reading()
        finding = Finding(
            check=self.name,
            problem=f"the loss scale was at its floor in {num} of the last {LOOK_EVERY} steps: gradients "
            "overflow without it",
            remedy="train in bf16, lower the learning rate, or look for what makes gradients so large",
        )
        return Reading(findings=[finding])

    def forget(self) -> None:
        self._at_floor = None
