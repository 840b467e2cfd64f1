"""Where a tracker's records go: the run's log on rank 0, nowhere on other ranks and in other processes."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

from harness.errors import TrackingError
from harness.runlog.reader import Run
from harness.runlog.soundness import LAST_STEP
from harness.tracking.boundary import Complaints, harmless, words_of
from harness.tracking.experiment import ExperimentConfig
from harness.tracking.lenient import text_of
from harness.tracking.numbers import Refused, whole_step
from harness.tracking.places import RunPlace
from harness.tracking.recorder import Recorder
from harness.tracking.settings import MirrorSettings
from harness.tracking.shared_place import SharedPlace

__all__ = ["Output"]

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 30.0


class Output:
    """The run that a tracker writes.

    A run has one writer: a forked child's copy and a pickled one are silent.

    Args:
        config: What it is called, and which mirrors it has.
        is_main: Whether this is rank 0, which writes.

    Attributes:
        place: The run's folders, the same on all ranks.
        first_step: The step that comes next; more than 0 where a run is resumed.
        complaints: What has been said already.

    Raises:
        TrackingError: the run to resume is not there, or its directory cannot be written.
    """

    def __init__(self, config: ExperimentConfig, *, is_main: bool) -> None:
        self.is_main = is_main
        self.is_closed = False
        self.complaints = Complaints()
        self.wandb = "off"
        self._log: Recorder | None = None
        self._pid = os.getpid()
        self._config = config
        shared = SharedPlace(config)
        self.place, self.first_step = shared.of_main(self._open) if is_main else shared.of_another()

    @property
    def writes(self) -> bool:
        """Whether records get anywhere."""
        return self._log is not None and self.is_own_process

    @property
    def is_own_process(self) -> bool:
        """Whether this is the process that opened the run, and not a forked child."""
        return os.getpid() == self._pid

    @property
    def mirrors_running(self) -> bool:
        """Whether the side process lives."""
        return self._log is not None and self.is_own_process and self._log.mirrors_running

    def takes(self, is_asked_for: bool) -> bool:
        """Whether what is given has to be looked at: not on other ranks, nor where it is switched off."""
        return is_asked_for and (self.writes or (self.is_main and self.is_closed))

    def write(self, kind: str, values: Mapping[str, Any], *, step: int | None = None) -> None:
        """Appends a record; see `RunLog.write`."""
        if self._log is not None and self.is_own_process:
            self._log.write(kind, values, step=step)
        elif self.is_main and self.is_closed:
            self.complaints.once("closed", message="what is logged after close() is lost")

    def rewind(self, step: int) -> None:
        """Abandons what was logged for `step` and later ones."""
        if self._log is not None and self.is_own_process:
            self._log.rewind(step)

    def leave_out(self, method: str, refused: Refused) -> None:
        """Says of each value that was refused that it is left out."""
        for name, why in refused.items():
            self.complaints.once(method, name, message=f"{method} leaves out {name[:100]!r}: {why}")

    def each(
        self, method: str, values: Mapping[Any, Any], action: Callable[[Any], dict[str, Any]]
    ) -> dict[str, dict[str, Any]]:
        """`action` of each value; those for which it fails are left out."""
        done, failed = {}, {}
        for name, value in values.items():
            try:
                done[text_of(name)] = action(value)
            except Exception as error:  # noqa: BLE001  (one odd value costs itself)
                failed[text_of(name)] = words_of(error)
        self.leave_out(method, failed)
        return done

    def step_of(self, step: Any, default: int) -> int:
        """The step's number; `default` without one, and where it is refused, for it costs itself."""
        if step is None:
            return default
        try:
            return whole_step(step)
        except Exception as error:  # noqa: BLE001  (anything may be given as a step)
            said = f"{words_of(error)} What was given with it is logged at {default}"
            self.complaints.once("step", message=said)
            return default

    def close(self, state: str) -> None:
        """The log's end, then complete mirrors."""
        log, self._log = self._log, None
        if log is not None:
            self._close_log(log, state)
        self.is_closed = True

    def __getstate__(self) -> dict[str, Any]:
        kept = ("is_closed", "place", "first_step", "_config")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, is_main=False, complaints=Complaints(), wandb="off")
        self._log, self._pid = None, os.getpid()

    @property
    def _complaints(self) -> Complaints:
        return self.complaints

    @harmless(lambda self: None)
    def _close_log(self, log: Recorder, state: str) -> None:
        is_known = state in ("finished", "stopped", "unstable", "crashed")
        log.close(state if is_known else "finished", wait_s=CLOSE_TIMEOUT_S)

    def _open(self, place: RunPlace) -> int:
        """Opens the log, starts the mirrors; gives the step that comes next."""
        info = {
            "experiment": self._config.experiment_name,
            "config": dataclasses.asdict(self._config),
            "checkpoint_dir": str(place.checkpoint_dir),
        }
        self._log = Recorder(place.run_dir, info=info)
        try:
            last_step = Run(place.run_dir).last_step
        except Exception as error:
            self._log.close("crashed")
            raise TrackingError(
                f"the log of {place.run_dir} cannot be read: {words_of(error)}",
                remedy="resume_run=False starts a new run",
            ) from error
        settings = _settings(self._config, place)
        self.wandb = settings.wandb
        self._log.start_mirrors(settings)
        return 0 if last_step is None else min(last_step + 1, LAST_STEP)


def _settings(config: ExperimentConfig, place: RunPlace) -> MirrorSettings:
    wandb = "off" if not config.enable_wandb else "offline" if config.anonymous else "online"
    return MirrorSettings(
        tensorboard=config.enable_tensorboard,
        tensorboard_dir=str(place.tensorboard_dir.resolve()),
        wandb=wandb,  # type: ignore[arg-type]
        wandb_tensorboard=config.sync_tensorboard,
        project=config.project_name,
        name=place.name,
        group=config.wandb_group or config.experiment_name,
        tags=tuple(config.tags),
        notes=config.notes,
    )
