"""How an attempt begins: its journal is opened on every rank, and the main one says where the run stands."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from harness import __version__, env
from harness.config import TrainConfig
from harness.data import Loader
from harness.dist import World, on_all_ranks
from harness.errors import HarnessError
from harness.runlog import events
from harness.training.counters import Counters
from harness.training.faults import describe
from harness.training.inputs import Inputs
from harness.training.journal import Journal, MainJournal, NodeJournal
from harness.training.micro_batch import NOTED, say_shares
from harness.training.progress import Progress
from harness.training.summary import Ending
from harness.training.utilisation import utilisation_of

__all__ = ["Attempt", "open_journal"]

_END_S = 15.0
"""How long a process may take to end once the others are gone."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """How this attempt begins."""

    counters: Counters
    resumed_from: int | None
    schedule: str
    """What the learning-rate schedule means for it, in words."""
    loader: Loader
    precision: str
    micro_batch_before: int
    """Samples of the largest one that has fitted into memory in earlier attempts."""


def open_journal(
    config: TrainConfig,
    world: World,
    directory: Path,
    inputs: Inputs,
    attempt: Attempt,
    progress: Progress,
) -> Journal:
    """This rank's journal, on all ranks or on none; somebody has to close it."""
    return _opened_on_all_ranks(lambda: _journal(config, world, directory, inputs, attempt, progress))


def _journal(
    config: TrainConfig,
    world: World,
    directory: Path,
    inputs: Inputs,
    attempt: Attempt,
    progress: Progress,
) -> Journal:
    """This rank's journal; the main one says how the attempt begins."""
    if not world.is_main:
        return NodeJournal(directory, config) if world.local_rank == 0 else Journal()
    step, recomputes = attempt.counters.step, config.parallel.activation_checkpointing == "full"
    about = {"world_size": world.world_size, "device": str(world.device), "host": platform.node()}
    about["schedule_steps"] = attempt.counters.schedule_steps
    about[NOTED] = max(attempt.micro_batch_before, attempt.loader.shares.micro_batch)
    # What decides about the last bits, for a replay.
    about |= {"precision": attempt.precision, "threads": torch.get_num_threads()}
    versions = {"harness": __version__, "torch": torch.__version__, "python": platform.python_version()}
    journal = MainJournal(
        directory,
        config,
        first_step=step,
        about={**about, "versions": versions, "data": inputs.fingerprints},
        utilisation=utilisation_of(inputs.task, recomputes_blocks=recomputes, world=world),
        step_indices=attempt.loader.step_indices,
        progress=progress,
        # A rank 0 that was cut off from its launcher's others has to notice that first.
        wait_s=config.parallel.silent_s + _END_S if env.is_restartable() else 0.0,
    )
    say_shares(attempt.loader.shares)
    if attempt.resumed_from is not None:
        journal.event(events.Resume(checkpoint=attempt.resumed_from), step)
        journal.say(f"going on at step {step} of {config.loop.steps}")
    if step < config.loop.steps:
        journal.say(attempt.schedule)
    for fault in config.faults:
        journal.event(events.Fault(what=describe(fault)), fault.step)
    return journal


def _opened_on_all_ranks(open_journal: Callable[[], Journal]) -> Journal:
    """This rank's; closed again if another rank cannot open its own, else log, lock and side process stay."""
    opened: list[Journal] = []
    try:
        on_all_ranks(lambda: opened.append(open_journal()))
    except HarnessError as error:
        for journal in opened:
            journal.close(Ending.of_error(error))
        raise
    return opened[0]
