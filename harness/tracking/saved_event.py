"""What the log tells of a save that has ended, whoever asked for it."""

from __future__ import annotations

from typing import Any

from harness.checkpoint import SaveOutcome
from harness.runlog.events import Checkpoint, CheckpointFailed

__all__ = ["saved_event"]


def saved_event(outcome: SaveOutcome) -> Checkpoint:
    """A `CheckpointFailed` if there is no checkpoint."""
    about: dict[str, Any] = {
        "num_steps": outcome.step,
        "blocked_s": outcome.blocked_s,
        "seconds": outcome.seconds,
    }
    if outcome.error is not None:
        return CheckpointFailed(error=str(outcome.error), **about)
    return Checkpoint(size_bytes=outcome.size_bytes, **about)
