"""What a run has done so far, as plain numbers that go into its checkpoints."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.records import StepRecord

__all__ = ["Counters", "incident_kind"]


@dataclass(slots=True, kw_only=True)
class Counters:
    """Equal on all ranks. A skipped step counts as a step and its tokens as seen; nothing else does."""

    step: int = 0
    """The next step."""
    tokens: int = 0
    """Tokens seen, those of skipped steps included."""
    num_skips: int = 0
    num_clips: int = 0
    incidents: dict[str, int] = field(default_factory=dict)
    """How many, by what was wrong."""
    num_outliers: int = 0
    """Outlier batches, which are no incidents."""
    last_val_loss: float = math.nan
    best_val_loss: float = math.inf
    val_step: int = -1
    """Step after which was last evaluated."""
    schedule_steps: int = 0
    """Length of the learning-rate schedule; 0 in checkpoints of releases that had none of its own."""

    def count(self, record: StepRecord) -> None:
        """Adds one finished step."""
        self.tokens += record.num_tokens
        self.num_skips += record.skipped
        self.num_clips += record.verdict == "clip"
        self.num_outliers += record.is_outlier
        kind = incident_kind(record)
        if kind is not None:
            self.incidents[kind] = self.incidents.get(kind, 0) + 1

    def count_evaluation(self, val_loss: float) -> None:
        """Notes the held-out loss after the steps so far."""
        self.last_val_loss = val_loss
        self.best_val_loss = min(self.best_val_loss, val_loss)
        self.val_step = self.step

    def state_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def keep_skips_of(self, other: Counters) -> None:
        """Takes over what was counted on a branch that a rollback left, so that no skip is forgotten."""
        self.num_skips, self.num_clips = other.num_skips, other.num_clips
        self.num_outliers = other.num_outliers
        self.incidents = dict(other.incidents)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


def incident_kind(record: StepRecord) -> str | None:
    """What was wrong with a step, in a word or two; None if nothing was."""
    if record.is_absurd:
        return "absurd gradient"
    if record.is_spike:
        return "spike"
    if record.skipped and not math.isfinite(record.loss):
        return "non-finite loss"
    if record.skipped:
        return "fp16 overflow" if record.loss_scale > 1.0 else "non-finite gradient"
    return "replicas differ" if record.replicas_differ else None
