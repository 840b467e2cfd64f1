"""What is written of a run, whoever trains it.

`harness train` has a `Journal`, a loop of somebody's own an `ExperimentTracker`; both write here, under the
names of `harness.runlog.names`: what both know of a step, an evaluation or a checkpoint is called the same in
both logs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.runlog.writer import RunLog
from harness.tracking.mirrors import MirrorHandle, start_mirrors
from harness.tracking.settings import MirrorSettings

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Recorder", "tensors_of"]


class Recorder:
    """A run's log, and the process that follows it into mirrors. Of a run there is one, on rank 0.

    Args:
        run_dir: The run's directory; made if need be.
        info: What to note about this attempt.
        wait_s: How long the process of an attempt before may still write; see `RunLog`.

    Raises:
        TrackingError: another process writes this run, or the directory cannot be written.
    """

    def __init__(self, run_dir: Path, *, info: Mapping[str, Any], wait_s: float = 0.0) -> None:
        self._log = RunLog(run_dir, info=info, wait_s=wait_s)
        self._mirrors = MirrorHandle(None)

    @property
    def attempt(self) -> int:
        """Number of this attempt, from 0."""
        return self._log.attempt

    @property
    def mirrors_running(self) -> bool:
        """Whether the side process lives."""
        return self._mirrors.is_alive()

    def start_mirrors(self, settings: MirrorSettings) -> None:
        """Lets a side process follow. Nothing is raised."""
        self._mirrors = start_mirrors(self._log.run_dir, settings)

    def write(self, kind: str, values: Mapping[str, Any], *, step: int | None = None) -> None:
        """Appends a record; see `RunLog.write`."""
        self._log.write(kind, values, step=step)

    def rewind(self, step: int) -> None:
        """Abandons what was logged for `step` and later ones."""
        self._log.rewind(step)

    def close(self, state: str, about: Mapping[str, Any] | None = None, *, wait_s: float = 0.0) -> None:
        """Notes how the run ended. The side process completes the mirrors by itself, unless `wait_s` says how
        long to wait for it."""
        try:
            self._log.end(state, about)
            self._log.close()
        finally:
            if wait_s:
                self._mirrors.close(wait_s)
            else:
                self._mirrors.leave()


def tensors_of(model: nn.Module, *, parameters: bool = True) -> dict[str, Tensor]:
    """The gradients of a model, and its parameters, under the names of their histograms."""
    named = list(model.named_parameters())
    tensors = {f"gradients/{name}": p.grad for name, p in named if p.grad is not None}
    return tensors | ({f"parameters/{name}": p for name, p in named} if parameters else {})
