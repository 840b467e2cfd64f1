"""A run that is begun again with some settings changed, or taken on from one of its checkpoints.

The fork is a run of its own beside its parent, which is never touched. From a checkpoint, it begins as a
directory that holds that checkpoint and the new configuration, and is resumed like any other run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from harness.config import TrainConfig, check_same_run
from harness.dashboard.checkpoints import Checkpoint, checkpoints
from harness.dashboard.form import read, values_of, yaml_of
from harness.dashboard.programs import (
    check_processes,
    configuration,
    last_processes,
    run_directory,
    start,
)
from harness.dashboard.records import RECORDS, Program
from harness.errors import CheckpointError, ConfigError
from harness.runlog.attempts import newest_attempt, schedule_steps
from harness.runlog.paths import checkpoints_dir, config_file, tokenizer_dir

__all__ = ["fork"]


def fork(
    run_dir: Path | str,
    name: str,
    overrides: Mapping[str, Any] | None = None,
    *,
    step: int | None = None,
    processes: int | None = None,
    within: Path | None = None,
) -> Program:
    """Starts a run called `name` beside `run_dir`, with the same settings but for `overrides`.

    Its notes say what it was forked from.

    Args:
        overrides: Values by key, as the form gives them; all keys or some.
        step: The parent's checkpoint to go on from: with the same model, data, seed, batch and optimizer,
            while the learning rate, its schedule and all that is not part of a run's identity may change.
            None: from the beginning, and everything may change.
        processes: None: as many as the parent last had.
        within: A folder above the run, below which no link is followed; None: the one that holds the run.

    Raises:
        ConfigError: the settings or the name are wrong, the name is taken, or the checkpoint cannot go on
            with these settings; nothing has been written then.
        CheckpointError: there is no such checkpoint.
        LaunchError: no program can be started.
    """
    parent_directory = Path(run_dir).resolve()
    parent = configuration(parent_directory, within=within)
    processes = last_processes(parent_directory, within=within) if processes is None else processes
    directory = run_directory(parent_directory.parent, name)
    config = read({**values_of(parent), **(overrides or {}), "name": name, "resume": "auto"})
    config = _with_origin(config, parent_directory.name, step)
    config = dataclasses.replace(config, runs_dir=str(directory.parent))
    check_processes(config, processes)
    _check_is_new(directory)
    if step is None:
        return start(config, runs_dir=directory.parent, processes=processes, within=within)
    within = within or parent_directory.parent
    _check_goes_on(config, parent, parent_directory, within)
    config = _with_schedule_of(parent, parent_directory, config, within)
    with _begun_at(_checkpoint(parent_directory, step, within), config, directory):
        return start(config, runs_dir=directory.parent, processes=processes, within=within)


def _with_origin(config: TrainConfig, parent: str, step: int | None) -> TrainConfig:
    origin = f"Forked from {parent}" + ("." if step is None else f" at step {step}.")
    notes = f"{origin}\n{config.tracking.notes}".rstrip()
    return dataclasses.replace(config, tracking=dataclasses.replace(config.tracking, notes=notes))


def _with_schedule_of(
    parent: TrainConfig, parent_directory: Path, config: TrainConfig, within: Path
) -> TrainConfig:
    """Other steps do not stretch the schedule, also where the checkpoint does not tell its length."""
    if config.schedule.steps is not None:
        return config
    length = schedule_steps(newest_attempt(parent_directory, within=within))
    schedule = dataclasses.replace(config.schedule, steps=length or parent.loop.steps)
    return dataclasses.replace(config, schedule=schedule)


def _check_is_new(directory: Path) -> None:
    if directory.is_dir() and not any(directory.iterdir()):
        return
    if directory.exists():
        raise ConfigError(
            f"{directory} already exists",
            rule="a fork is a run of its own",
            remedy="choose another name",
        )


def _check_goes_on(config: TrainConfig, parent: TrainConfig, parent_directory: Path, within: Path) -> None:
    # The rate is set from the configuration at every step; a run of its own may have another one.
    optim = dataclasses.replace(config.optim, lr=parent.optim.lr)
    same_rate = dataclasses.replace(config, optim=optim, schedule=parent.schedule)
    try:
        check_same_run(same_rate, config_file(parent_directory), within=within)
    except ConfigError as error:
        raise ConfigError(
            error.problem,
            rule="a checkpoint is resumed with the model, data, batch and optimizer that it was saved with",
            remedy="fork from the beginning, or leave that setting as it was",
        ) from error


def _checkpoint(run_dir: Path, step: int, within: Path) -> Checkpoint:
    found = checkpoints(run_dir, within=within)
    there = {checkpoint.step: checkpoint for checkpoint in found}
    if step not in there:
        raise CheckpointError(
            f"{run_dir} has no checkpoint of step {step}",
            rule=f"there are {', '.join(map(str, there)) or 'none'}",
            remedy="choose one of them",
        )
    return there[step]


@contextlib.contextmanager
def _begun_at(checkpoint: Checkpoint, config: TrainConfig, directory: Path) -> Iterator[None]:
    """Makes the directory of a run that stands at `checkpoint`, whole or not at all; on an error it goes."""
    try:
        (directory.parent / RECORDS).mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent / RECORDS, prefix=".fork-") as temporary:
            begun = Path(temporary) / "run"
            # A checkpoint's files are never written again, so both runs can have the same ones.
            target = checkpoints_dir(begun) / checkpoint.path.name
            shutil.copytree(checkpoint.path, target, copy_function=_link, symlinks=True)
            tokenizer = tokenizer_dir(checkpoint.path.parent.parent)
            if tokenizer.is_dir():
                shutil.copytree(tokenizer, tokenizer_dir(begun), copy_function=_link, symlinks=True)
            config_file(begun).write_text(yaml_of(config), encoding="utf-8")
            begun.rename(directory)
    except (OSError, shutil.Error) as error:
        raise ConfigError(
            f"cannot create {directory}: {getattr(error, 'strerror', None) or 'a file cannot be copied'}",
            rule="the fork begins with the parent's checkpoint, which must not be deleted while it is copied",
            remedy="check the disk's free space, and which checkpoints the parent still has",
        ) from error
    try:
        yield
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # the file system has no hard links
        shutil.copy2(source, target)
