"""The section `checkpoint`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from harness.config.checks import require_not_negative, require_positive

__all__ = ["CheckpointConfig"]


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    SECTION = "checkpoint"

    every: int = 100
    """Steps between checkpoints; 0: only at the end."""
    keep_last: int = 3
    """Newest checkpoints to keep; the last healthy one is kept whatever this says."""
    keep_best: int = 0
    """Checkpoints with the lowest validation loss to keep besides."""
    keep_every: int = 0
    """Steps whose multiples are kept for ever; 0: none."""
    healthy_after: int = 20
    """Steps without incident after which a checkpoint counts as healthy."""
    when_busy: Literal["wait", "drop"] = "wait"
    """What happens to a checkpoint that is due while the one before is still being written."""
    give_up_after_s: float = 3600.0
    """A run that could save nothing for this long is ended."""
    in_memory: bool = False
    """Keep a copy of the last healthy state in host memory, so that a rollback needs no disk."""

    def __post_init__(self) -> None:
        require_not_negative(self, "every", "keep_best", "keep_every")
        require_positive(self, "keep_last", "healthy_after", "give_up_after_s")
