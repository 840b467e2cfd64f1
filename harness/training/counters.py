"""What a run has done so far, as plain numbers that go into its checkpoints."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.records import StepRecord

__all__ = ["Counters"]


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
    last_val_loss: float = math.nan
    best_val_loss: float = math.inf
    val_step: int = -1
    """Step after which was last evaluated."""

    def count(self, record: StepRecord) -> None:
        """Adds one finished step."""
        self.tokens += record.num_tokens
        self.num_skips += record.skipped
        self.num_clips += record.verdict == "clip"
        if is_incident(record):
            kind = (record.reason or record.verdict).partition(":")[0]
            self.incidents[kind] = self.incidents.get(kind, 0) + 1

    def count_evaluation(self, val_loss: float) -> None:
        """Notes the held-out loss after the steps so far."""
        self.last_val_loss = val_loss
        self.best_val_loss = min(self.best_val_loss, val_loss)
        self.val_step = self.step

    def state_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


def is_incident(record: StepRecord) -> bool:
    """Whether something was wrong with the step: it was skipped, or a rule spoke."""
    return record.skipped or record.reason is not None
