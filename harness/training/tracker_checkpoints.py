"""The experiment tracker with checkpoints: where `harness.tracking` and `harness.checkpoint` meet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.checkpoint import Checkpointer
from harness.errors import CheckpointError
from harness.tracking.experiment import ExperimentConfig
from harness.tracking.tracker import ExperimentTracker as BareTracker

__all__ = ["ExperimentTracker", "TrackerCheckpoints"]

_KEY = "training"


class TrackerCheckpoints:
    """State dictionaries as verified checkpoints in one folder; all are kept."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._checkpointer = Checkpointer(folder, keep_every=1)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Copies the state now and writes it in the background."""
        self._checkpointer.save(step, {_KEY: state})

    def load(self, step: int | None) -> dict[str, Any]:
        """The state of the step, or of the newest checkpoint.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        holder: dict[str, Any] = {_KEY: {}}
        if self._checkpointer.load(holder, step=step) is None:
            raise CheckpointError(f"there is no checkpoint in {self._folder}")
        state: dict[str, Any] = holder[_KEY]
        return state

    def close(self) -> None:
        """Waits for the save under way."""
        self._checkpointer.close()


class ExperimentTracker(BareTracker):
    """`harness.tracking.tracker.ExperimentTracker` whose checkpoints go through `harness.checkpoint`.

    Args:
        config: What the experiment is called and what is logged.
        rank: This process's rank; default: what the launcher says. Only rank 0 logs.
    """

    def __init__(self, config: ExperimentConfig | None = None, *, rank: int | None = None) -> None:
        super().__init__(config, rank=rank, checkpoints=TrackerCheckpoints)
