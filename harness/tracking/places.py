"""Where an experiment's run lies, and which one is resumed."""

from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path

from harness.errors import TrackingError
from harness.files import read_file
from harness.runlog.paths import checkpoints_dir, wandb_id_file
from harness.runlog.preview import open_digest
from harness.runlog.reader import is_run
from harness.tracking.boundary import words_of
from harness.tracking.experiment import ExperimentConfig
from harness.tracking.names import folder_name

__all__ = ["RunPlace", "checkpoints_of", "find_place", "place_of"]

logger = logging.getLogger(__name__)

LONGEST_ID_BYTES = 256


@dataclasses.dataclass(frozen=True, slots=True)
class RunPlace:
    """The folders of one run; absolute, so that a program may change its own."""

    name: str
    run_dir: Path
    tensorboard_dir: Path
    checkpoint_dir: Path


def find_place(config: ExperimentConfig, *, create: bool) -> RunPlace:
    """The run that the configuration means: the one to be resumed, or a new one.

    Args:
        config: The experiment.
        create: Makes the new run's directory, so that no other process gets the same.

    Raises:
        TrackingError: there is no run to resume, or the directory cannot be made.
    """
    runs = Path(config.tensorboard_dir).absolute().parent
    return place_of(config, _resumed(config, runs) if config.resume_run else _new(config, runs, create))


def place_of(config: ExperimentConfig, name: str) -> RunPlace:
    """The folders of the run of that name."""
    tensorboard, models = Path(config.tensorboard_dir).absolute(), Path(config.model_save_dir).absolute()
    return RunPlace(name, tensorboard.parent / name, tensorboard / name, models / name)


def _new(config: ExperimentConfig, runs: Path, create: bool) -> str:
    wanted = config.run_name or f"{config.experiment_name}-{time.strftime('%Y%m%d-%H%M%S')}"
    name, count = folder_name(wanted), 1
    while create:
        try:
            (runs / name).mkdir(parents=True)
            break
        except FileExistsError:
            count += 1
            name = f"{folder_name(wanted)}-{count}"
        except OSError as error:
            raise TrackingError(
                f"the run directory {runs / name} cannot be made: {error.strerror}",
                remedy="set tensorboard_dir to a folder that can be written",
            ) from error
    return name


def _resumed(config: ExperimentConfig, runs: Path) -> str:
    wanted = config.run_id or config.run_name
    candidates = [path for path in runs.glob("*") if is_run(path)]
    if wanted is not None:
        found = [path for path in candidates if wanted in (path.name, _wandb_id(path))]
        found = found or [path for path in candidates if path.name == folder_name(wanted)]
    else:
        updated = {path: _logged_last(path, config.experiment_name) for path in candidates}
        ours = sorted((at, path) for path, at in updated.items() if at is not None)
        found = [path for _, path in ours[-1:]]
    if not found:
        raise TrackingError(
            f"there is no run {wanted or config.experiment_name!r} in {runs} to resume",
            rule="run_id is the name of a run's folder, or its W&B id",
            remedy=f"`harness runs {runs}` lists what there is; resume_run=False starts a new one",
        )
    return found[0].name


def checkpoints_of(run_dir: Path) -> Path:
    """The folder of a run's checkpoints, which need not exist: in its directory, or where its log says.

    An `ExperimentTracker` keeps them in `model_save_dir`, beside the folder of runs unless it was set. A run
    that was moved or copied together with that folder is found there.
    """
    own = checkpoints_dir(run_dir)
    if own.is_dir() or not is_run(run_dir):
        return own
    info = open_digest(run_dir).info
    config = info.get("config") or {}
    run = run_dir.resolve()
    named = [Path(info["checkpoint_dir"])] if "checkpoint_dir" in info else []
    if isinstance(config.get("model_save_dir"), str):
        # Relative to where the program ran, which is usually where its folder of runs lies.
        named += [folder / config["model_save_dir"] / run.name for folder in (run.parent.parent, Path.cwd())]
    return next((path for path in named if path.is_dir()), own)


def _logged_last(run_dir: Path, experiment: str) -> float | None:
    """When a run of the experiment logged last, in seconds since the epoch; None if it is none of it.

    A run that cannot be read is passed over: it may be anybody's.
    """
    try:
        run = open_digest(run_dir)
    except Exception as error:  # noqa: BLE001  (whatever it is, the others are there to be resumed)
        logger.warning("%s is passed over, it cannot be read: %s", run_dir, words_of(error))
        return None
    return (run.updated or 0.0) if run.info.get("experiment") == experiment else None


def _wandb_id(run_dir: Path) -> str | None:
    kept = wandb_id_file(run_dir)
    try:
        return read_file(kept, most_bytes=LONGEST_ID_BYTES).decode(errors="replace")
    except OSError:
        return None
