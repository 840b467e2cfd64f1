"""A tracker's checkpoints: what goes into one, and how one is found again."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from harness.errors import TrackingError
from harness.runlog.events import Checkpoint, CheckpointFailed
from harness.tracking.boundary import Complaints, harmless, words_of
from harness.tracking.checkpoint_names import Wanted, wanted_checkpoint
from harness.tracking.lenient import saved_values
from harness.tracking.numbers import numbers_of
from harness.tracking.output import Output

if TYPE_CHECKING:
    from torch import nn

__all__ = ["CheckpointStore", "Checkpoints", "SaveEnd", "Training"]

logger = logging.getLogger(__name__)

_HAS_BARE_NAMES = "has_bare_names"
"""Key of a checkpoint whose model has the names of `bare_state`; earlier ones have none."""


class SaveEnd(NamedTuple):
    """How a save ended."""

    step: int
    event: Checkpoint
    """What there is to say of it; a `CheckpointFailed` if there is no checkpoint."""


class CheckpointStore(Protocol):
    """Where checkpoints go; `harness.training` provides one on top of `harness.checkpoint`."""

    def save(self, step: int, build: Callable[[], dict[str, Any]]) -> list[str]:
        """Keeps the plain data and tensors that `build` gives, under the step's number; returns the names
        of tensors that are not finite."""

    def ended(self) -> list[SaveEnd]:
        """The saves that have ended since the last call, in order. Local."""

    def load(self, wanted: Wanted) -> dict[str, Any]:
        """What was saved."""

    def close(self) -> None:
        """Waits for what is still being written."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What a checkpoint is made of."""

    model: Any
    optimizer: Any
    scheduler: Any
    epoch: int
    step: int
    loss: Any
    metrics: Any

    def state(self) -> dict[str, Any]:
        """As `load_checkpoint` gives it back; the tensors are the live ones."""
        from harness.tracking.model_state import bare_state

        loss, _ = numbers_of({"loss": self.loss})
        state = saved_values({"loss": self.loss, "metrics": self.metrics, **loss})
        state |= {"model_state_dict": bare_state(self.model), _HAS_BARE_NAMES: True}
        state |= {"epoch": self.epoch, "step": self.step}
        if self.optimizer is not None:
            state["optimizer_state_dict"] = self.optimizer.state_dict()
        if self.scheduler is not None:
            state["scheduler_state_dict"] = self.scheduler.state_dict()
        return state


class Checkpoints:
    """The checkpoints of a tracker's run.

    Args:
        open_store: Makes the store for a folder; None if there is none.
        output: The tracker's log, which is told of each.
    """

    def __init__(self, open_store: Callable[[Path], CheckpointStore] | None, output: Output) -> None:
        self._open_store = open_store
        self._output = output
        self._store: CheckpointStore | None = None
        self._under_way: list[Checkpoint] = []
        """What there is to say of the saves that have not ended; they end in order."""

    @property
    def store(self) -> CheckpointStore:
        """Opened when it is first used; all ranks use it together.

        Raises:
            TrackingError: there is none.
        """
        if self._store is None:
            self._store = self.require()(self._output.place.checkpoint_dir)
        return self._store

    def require(self) -> Callable[[Path], CheckpointStore]:
        """What makes the store.

        Raises:
            TrackingError: this tracker has none.
        """
        if self._open_store is None:
            raise TrackingError(
                "this tracker has no store for checkpoints",
                remedy="`from harness import ExperimentTracker` has one",
            )
        return self._open_store

    @harmless(lambda self: None)
    def save_checkpoint(self, training: Training) -> None:
        """Saves it in the background. What fails is said, and noted in the log, as is what is committed."""
        step, epoch = training.step, training.epoch
        if not self._has_part():
            return
        self._under_way.append(Checkpoint(epoch=epoch))
        try:
            nonfinite = self.store.save(step, training.state)
        except Exception as error:  # noqa: BLE001  (whatever it is, training is worth more)
            self._complaints.failed("save_checkpoint", error, epoch, step)
            self._write_event(step, self._under_way.pop(), CheckpointFailed(error=words_of(error)))
            return
        if nonfinite:
            some = ", ".join(nonfinite[:5])
            logger.error("the checkpoint of epoch %d, step %d is not finite: %s", epoch, step, some)
            self._under_way[-1] = Checkpoint(epoch=epoch, nonfinite=tuple(nonfinite[:100]))
        self._note_ended(self.store)  # the one before, and this one should it be so fast

    def load(self, name: str | Path | None, model: nn.Module | None) -> dict[str, Any]:
        """See `ExperimentTracker.load_checkpoint`."""
        state = self.store.load(wanted_checkpoint(name))
        self._note_ended(self.store)
        from harness.tracking.model_state import as_named_by

        is_bare = state.pop(_HAS_BARE_NAMES, False)
        state["model_state_dict"] = as_named_by(state["model_state_dict"], model, is_bare=is_bare)
        return state

    @harmless(lambda self: None)
    def close(self) -> None:
        """Waits for what is still being written."""
        store, self._store = self._store, None
        if store is not None and self._output.is_own_process:
            try:
                store.close()
            finally:
                self._note_ended(store)

    def __getstate__(self) -> dict[str, Any]:
        return {"_open_store": self._open_store, "_output": self._output, "_store": None, "_under_way": []}

    @property
    def _complaints(self) -> Complaints:
        return self._output.complaints

    @harmless(lambda self: None)
    def _note_ended(self, store: CheckpointStore) -> None:
        for step, event in store.ended():
            self._write_event(step, self._under_way.pop(0), event)

    def _write_event(self, step: int, known: Checkpoint, event: Checkpoint) -> None:
        event = dataclasses.replace(event, epoch=known.epoch, nonfinite=known.nonfinite)
        self._output.write("event", event.to_values(), step=step)

    def _has_part(self) -> bool:
        """Whether this process saves: rank 0, and with it all ranks of its process group."""
        if not self._output.is_own_process:
            return False
        from harness.dist import has_group

        return self._output.is_main or has_group()
