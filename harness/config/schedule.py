"""The section `schedule`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from harness.config.checks import require, require_not_negative, require_positive

__all__ = ["ScheduleConfig"]


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over the run, as a share of optim.lr."""

    SECTION = "schedule"

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    """cosine, warm-up-stable-decay (linear at the end), or constant; each after a linear warm-up."""
    warmup_steps: int = 20
    """Steps of linear warm-up from 0."""
    decay_frac: float = 0.2
    """Share of the schedule (`steps`) that the decay of wsd takes."""
    min_lr_frac: float = 0.1
    """Where the decay ends, as a share of the peak."""
    steps: int | None = None
    """Steps after which cosine and wsd have decayed; from there on the rate stays. Default: loop.steps of the
    run's first attempt, whatever loop.steps is later. Another number for a run that goes on is another rate
    from that step on, and is said."""

    def __post_init__(self) -> None:
        require_not_negative(self, "warmup_steps")
        if self.steps is not None:
            require_positive(self, "steps")
        require(self, "decay_frac", 0 <= self.decay_frac <= 1, "it has to lie in [0, 1]")
        require(self, "min_lr_frac", 0 <= self.min_lr_frac <= 1, "it has to lie in [0, 1]")
