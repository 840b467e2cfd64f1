"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from harness.checkpoint import Checkpointer
from harness.config import TrainConfig
from harness.data import Loader, Task
from harness.dist import World, plain
from harness.records import StepRecord
from harness.stability import Ladder, StepGuard
from harness.training.counters import Counters
from harness.training.evaluate import evaluate, rehearse
from harness.training.journal import InFlight, Journal
from harness.training.optim import set_learning_rate
from harness.training.schedule import learning_rate
from harness.training.step import StepRunner
from harness.training.stop import StopRequest

__all__ = ["Run", "Status", "train_loop", "train_step"]

Status = str
"""How an attempt ended: `finished` or `stopped`."""


@dataclass(kw_only=True)
class Run:
    """All that takes part in a run; put together in `build`."""

    config: TrainConfig
    world: World
    directory: Path
    task: Task
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loader: Loader
    runner: StepRunner
    guard: StepGuard
    ladder: Ladder
    checkpointer: Checkpointer
    saved: dict[str, object]
    """What a checkpoint holds, by name."""
    counters: Counters
    journal: Journal
    stop: StopRequest
    precision: str
    schedule_steps: int
    """Length of the learning-rate schedule, whatever the length of the run."""
    on_incident: Callable[[StepRecord], None] | None = None
    in_flight: dict[int, InFlight] = field(default_factory=dict)
    """The steps whose records are still on their way, by number."""
    saved_step: int = -1
    """Finished steps at the last save."""
    handled_samples: int = 0
    """Where the samples of the last step whose record was handled end in the order of the data."""

    def learning_rate(self, step: int) -> float:
        """The schedule's value at `step`."""
        config = self.config
        return learning_rate(
            step, peak=config.optim.lr, num_steps=self.schedule_steps, schedule=config.schedule
        )


def train_loop(run: Run) -> Status:
    """Trains until the last step, or until a rank was asked to stop; then commits a checkpoint.

    Raises:
        InstabilityError: the ladder's last rung; on all ranks at the same step.
        CheckpointError: no checkpoint could be written for too long; on all ranks at the same step.
        ConfigError: DDP waited for the gradient of a parameter that took no part in the loss; on all ranks.
    """
    stopped = False
    if run.counters.step < run.config.loop.steps:
        run.loader.start()
        rehearse(run.model, run.task, run.config, run.world, precision=run.precision)
    while run.counters.step < run.config.loop.steps and not stopped:
        stopped = train_step(run)
    run.runner.unused.refuse()
    return _finish(run, stopped)


def train_step(run: Run) -> bool:
    """One step, and what is due after it; whether a rank was asked to stop.

    ```
    learning rate -> batch -> forward, backward -> guard (verdict, update) -> records of earlier steps
                  -> every few steps: evaluation, checkpoint
    ```

    All ranks take every branch together: it hangs on the step's number or on records, which are equal on all
    ranks. Before an evaluation or a checkpoint all records are waited for, so that no decision is pending in
    what is saved.
    """
    started = time.perf_counter()
    step = run.counters.step
    set_learning_rate(run.optimizer, run.learning_rate(step))
    first_sample = run.loader.position
    micro_batches = run.loader.next()
    data_wait_s = time.perf_counter() - started
    compute_s = run.runner.run(step, micro_batches)
    run.guard.step(
        nominal_tokens=run.runner.nominal_tokens,
        compute_s=compute_s,
        data_wait_s=data_wait_s,
        stop_requested=run.stop.requested or bool(run.runner.unused.found),
    )
    if _is_due(run, run.config.tracking.histograms_every):
        run.journal.histograms(step, plain(run.model))
    run.optimizer.zero_grad(set_to_none=True)
    run.in_flight[step] = InFlight(time.perf_counter() - started, (first_sample, run.loader.position))
    run.counters.step = step + 1
    evaluating = _is_due(run, run.config.loop.eval_every)
    saving = _is_due(run, run.config.checkpoint.every)
    is_last = run.counters.step == run.config.loop.steps
    if evaluating or saving or is_last:
        run.guard.flush()
    stopped = _handle_records(run, run.guard.drain())
    if run.counters.step == step + 1:  # and not rolled back
        if evaluating:
            _evaluate(run)
        if saving:
            _save(run)
    _note_saves(run)
    return stopped


def _is_due(run: Run, every: int) -> bool:
    return every > 0 and run.counters.step % every == 0


def _handle_records(run: Run, records: list[StepRecord]) -> bool:
    """Counts and logs finished steps and lets the ladder act, which may roll the run back; whether a rank was
    asked to stop."""
    stopped = False
    for record in records:
        run.counters.count(record)
        in_flight = run.in_flight.pop(record.step)
        run.handled_samples = in_flight.samples[1]
        run.journal.step(record, run.counters, lr=run.learning_rate(record.step), in_flight=in_flight)
        run.checkpointer.observe(record.step + 1, incident=record.reason is not None)
        if run.on_incident is not None and record.reason is not None:
            run.on_incident(record)
        stopped = stopped or any(row.stop_requested for row in record.per_rank)
        if run.ladder.observe(record) == "rollback":
            break  # the records that follow are of the branch that was left
    return stopped


def _evaluate(run: Run) -> None:
    metrics = evaluate(run.model, run.task, run.config, run.world, precision=run.precision)
    run.counters.count_evaluation(metrics["val/loss"])
    run.journal.evaluation(run.counters.step - 1, metrics)


def _save(run: Run) -> None:
    run.checkpointer.save(run.counters.step, run.saved, metric=run.counters.last_val_loss)
    run.saved_step = run.counters.step


def _note_saves(run: Run) -> None:
    for outcome in run.checkpointer.outcomes():
        run.journal.saved(outcome)


def _finish(run: Run, stopped: bool) -> Status:
    """Handles the records that are left, evaluates a finished run, and commits the last checkpoint."""
    run.guard.flush()
    _handle_records(run, run.guard.drain())
    finished = run.counters.step >= run.config.loop.steps
    if finished and run.counters.val_step != run.counters.step:
        _evaluate(run)
    if run.counters.step != run.saved_step:
        _save(run)
    try:
        run.checkpointer.wait()
    finally:
        _note_saves(run)
    return "finished" if finished else "stopped"
