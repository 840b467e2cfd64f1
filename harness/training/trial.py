"""A few steps of a run, with every check for silent errors, before the long run: nothing of it is kept."""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path

from harness.config import TrainConfig
from harness.dist import World, barrier, from_main
from harness.errors import TrackingError
from harness.files import nearest_folder
from harness.records import Finding, StepRecord
from harness.stop import StopRequest
from harness.training.build import build_run
from harness.training.callbacks import Callback, Training
from harness.training.loop import Run, train_loop
from harness.training.silent import RunChecks
from harness.training.summary import Ending
from harness.training.trial_checks import State, difference, mode_finding, state_of, step_finding

__all__ = ["training_checks"]

STEPS = 24
"""Two looks and what is still in flight."""


def training_checks(config: TrainConfig, world: World) -> list[Finding]:
    """Trains for a few steps in a folder that is thrown away; what the checks found, equal on all ranks.

    Raises:
        HarnessError: whatever would end the run.
    """
    config.check_world(world.world_size)
    with _passing_folder(config, world) as folder, StopRequest() as stop:
        short = _short(config, folder)
        findings, saved = _train(short, world, stop)
        gc.collect()  # of the first run, whose memory the second one needs
        read = _read_back(replace(short, resume="must"), world, stop)
        return [*findings, *filter(None, [difference(saved, read)])]


def _train(config: TrainConfig, world: World, stop: StopRequest) -> tuple[list[Finding], State]:
    """What a few steps show, and what the checkpoint at their end holds."""
    noted = _Noted()
    run = build_run(config, world, stop, [noted])
    try:
        train_loop(run)
        looked = [mode_finding(run), step_finding(run)]
        of_run = [one.found for one in run.callbacks.own if isinstance(one, RunChecks)]
        return [*noted.findings, *chain(*of_run), *filter(None, looked)], state_of(run)
    finally:
        _close(run)


def _read_back(config: TrainConfig, world: World, stop: StopRequest) -> State:
    """What another run has once it is built from that checkpoint."""
    run = build_run(config, world, stop)
    try:
        return state_of(run)
    finally:
        _close(run)


def _close(run: Run) -> None:
    run.guard.close()
    run.loader.close()
    run.checkpointer.close()
    run.journal.close(Ending(status="finished"))


@contextmanager
def _passing_folder(config: TrainConfig, world: World) -> Iterator[str]:
    """A folder on the disk of the runs, which the ranks of all machines see; rank 0 makes and removes it."""
    folder = from_main(lambda: _make_folder(nearest_folder(Path(config.runs_dir))))
    try:
        yield folder
        barrier()  # no rank writes there any more
    finally:
        if world.is_main:
            shutil.rmtree(folder, ignore_errors=True)


def _make_folder(within: Path) -> str:
    try:
        return tempfile.mkdtemp(prefix=".harness-doctor-", dir=within)
    except OSError as error:
        raise TrackingError(
            f"{within} cannot be written: {error.strerror}", remedy="name another folder by runs_dir"
        ) from error


class _Noted(Callback):
    """Keeps what was found, an incident too."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []

    def on_step(self, run: Training, record: StepRecord) -> None:
        self.findings += record.findings
        if record.reason is not None:
            remedy = "look at the incident before the long run"
            self.findings.append(Finding(check="incident", problem=record.reason, remedy=remedy))


def _short(config: TrainConfig, folder: str) -> TrainConfig:
    """The same run, but for its length and for what it leaves behind."""
    steps = min(config.loop.steps, STEPS)
    return replace(
        config,
        name="doctor",
        runs_dir=folder,
        resume="never",
        faults=(),
        loop=replace(config.loop, steps=steps, eval_every=max(1, steps // 2)),
        schedule=replace(config.schedule, steps=config.schedule.steps or config.loop.steps),
        checkpoint=replace(config.checkpoint, every=0),
        guard=replace(config.guard, silent_errors="on", state_every=1, replicas_every=1),
        tracking=replace(
            config.tracking,
            tensorboard=False,
            wandb="off",
            trackio=False,
            prometheus=False,
            alerts=(),
            webhook=None,
            mirrors=(),
            progress="off",
            histograms_every=0,
            system_every_s=0.0,
        ),
    )
