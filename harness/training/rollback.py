"""The ladder's second rung: back to the last healthy checkpoint, and past the data that broke the run."""

from __future__ import annotations

import dataclasses

from harness.errors import CheckpointError
from harness.records import StepRecord
from harness.training.callbacks import Rollback
from harness.training.loop import Run
from harness.training.progress import Phase

__all__ = ["roll_back"]


def roll_back(run: Run, record: StepRecord) -> bool:
    """Brings `run` back to its last healthy state; False if there is none. On all ranks at the same step.

    Steps are numbered on from the checkpoint; their data begins after the failed step, or after
    `guard.rollback_skip_steps` steps' worth, whichever is later. What counts skips and rollbacks is not
    rolled back.
    """
    run.progress.enter(Phase.ROLLBACK, record.step)
    failed_at = run.handled_samples
    before = dataclasses.replace(run.counters)
    saved = {name: part for name, part in run.saved.items() if name != "ladder"}
    try:
        step = run.checkpointer.rollback(saved)
    except CheckpointError as error:
        run.journal.say(f"no rollback: {error}")
        return False
    run.counters.keep_skips_of(before)
    run.counters.schedule_steps = run.schedule_steps
    run.in_flight.clear()
    run.saved_step = -1  # the checkpoint knows neither of this rollback nor of the data that it skips
    skipped = max(
        run.config.guard.rollback_skip_steps * run.config.loop.global_batch, failed_at - run.loader.position
    )
    run.loader.skip(skipped)
    run.callbacks.on_rollback(run, Rollback(step=step, record=record, skipped_samples=skipped))
    return True
