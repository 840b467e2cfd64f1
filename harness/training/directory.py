"""The run's directory: made for a new run, checked for one that goes on."""

from __future__ import annotations

from pathlib import Path

from harness.atomic import write_atomically
from harness.config import LoopConfig, TrainConfig, check_same_run, dump_yaml, flatten, read_yaml
from harness.data import Task
from harness.errors import ConfigError
from harness.runlog.attempts import newest_attempt, schedule_steps
from harness.runlog.paths import CONFIG_FILE, config_file
from harness.user_code import user_code

__all__ = ["prepare_directory"]


def prepare_directory(config: TrainConfig, task: Task | None = None) -> tuple[Path, int]:
    """Makes the run's directory, or checks that the one that is there is this run's; rank 0 only.

    Args:
        task: What keeps something there; None: nothing does.

    Returns:
        The directory, and the length of the learning-rate schedule in the attempt before; if there was none,
        `loop.steps` of this one.

    Raises:
        ConfigError: `resume` forbids what was found, the directory holds something else or another
            configuration, or it cannot be written.
    """
    directory = Path(config.runs_dir) / config.name
    saved = config_file(directory)
    steps_before = config.loop.steps
    try:
        if saved.exists():
            _check_may_resume(config, directory)
            check_same_run(config, saved)
            steps_before = _schedule_before(directory)
        else:
            _check_may_start(config, directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(saved, dump_yaml(config), sync=True)
        if task is not None and task.keep is not None:
            with user_code("the task's keep", rule="it writes into the run's directory"):
                task.keep(directory)
    except OSError as error:
        raise ConfigError(
            f"cannot write to the run directory {directory}: {error.strerror}",
            rule="rank 0 keeps log and checkpoints there",
            remedy="set --runs_dir to a folder that can be written",
        ) from error
    return directory, steps_before


def _schedule_before(directory: Path) -> int:
    """What the log says; an attempt that ended before its first checkpoint has left its own configuration."""
    logged = schedule_steps(newest_attempt(directory))
    if logged is not None:
        return logged
    before = flatten(read_yaml(config_file(directory)))
    steps: int = before.get("schedule.steps") or before.get("loop.steps", LoopConfig().steps)
    return steps


def _check_may_resume(config: TrainConfig, directory: Path) -> None:
    if config.resume == "never":
        raise ConfigError(
            f"{directory} holds a run already, and resume is 'never'",
            rule="a run is never overwritten",
            remedy="choose another --name",
        )


def _check_may_start(config: TrainConfig, directory: Path) -> None:
    if config.resume == "must":
        raise ConfigError(
            f"{directory} holds no run, and resume is 'must'",
            rule="there has to be a run to go on with",
            remedy="check --runs_dir and --name, or leave resume at 'auto'",
        )
    if directory.exists() and any(directory.iterdir()):
        raise ConfigError(
            f"{directory} is not empty and holds no {CONFIG_FILE}",
            rule="a run needs a directory of its own",
            remedy="choose another --name",
        )
