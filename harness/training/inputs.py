"""What a run is made of besides its settings: task, data, callbacks, faults; equal on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from harness.config import GuardConfig, TrainConfig
from harness.data import Task, fetch, find_quarantined
from harness.dist import Deferred, World, from_main, on_all_ranks
from harness.stability.checks.all import Checks, load_checks
from harness.stability.detectors import configured_rule
from harness.training.agreed import LONGEST_S, agree_on_data, agree_on_files, agree_on_settings
from harness.training.callbacks import Callback, load_callbacks
from harness.training.faults import FaultInjector, possible_faults
from harness.training.precision import resolved_precision
from harness.training.tasks import build_task
from harness.user_code import check_modules

__all__ = ["Inputs", "agreed_inputs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a run is made of besides its settings, found equal on all ranks before anything is written."""

    task: Task
    callbacks: Sequence[Callback]
    """Those that the configuration names."""
    fingerprints: dict[str, str]
    """Of the data sets."""
    quarantined: tuple[int, ...]
    """Samples that are never trained on, by index."""
    faults: FaultInjector
    deferred: Deferred | None
    """Within which the model was built, where its initialisation is put off."""


def agreed_inputs(config: TrainConfig, world: World) -> Inputs:
    """Makes them; whatever is wrong with one is raised on every rank."""
    agree_on_settings(config)
    config.parallel.check_precision(resolved_precision(config, world.device))
    files = agree_on_files(config)
    deferred = Deferred() if config.parallel.meta_init else None
    with nullcontext() if deferred is None else deferred:
        task = on_all_ranks(lambda: build_task(config, files=files), timeout_s=LONGEST_S)
    on_all_ranks(lambda: _check_names(config.guard))
    callbacks = on_all_ranks(lambda: load_callbacks(config))
    from_main(lambda: check_modules(config.tracking.mirrors, key="tracking.mirrors"))
    fingerprints = agree_on_data(task, config)
    faults = on_all_ranks(
        lambda: FaultInjector(
            possible_faults(config, rank=world.rank, world_size=world.world_size),
            model=task.model,
            rank=world.rank,
            sample=lambda: fetch(task.train_data, [0]),
        )
    )
    listed = config.data.quarantine
    quarantined = from_main(
        lambda: find_quarantined(task.train_data, listed), timeout_s=LONGEST_S if listed else None
    )
    return Inputs(
        task=task,
        callbacks=callbacks,
        fingerprints=fingerprints,
        faults=faults,
        quarantined=quarantined,
        deferred=deferred,
    )


def _check_names(guard: GuardConfig) -> None:
    """Makes what the guard will be made of once, so that a wrong name or value is said before anything is
    written."""
    configured_rule(guard)
    Checks(guard, load_checks(guard))
