"""The training loop."""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from harness.checkpoint import Checkpointer, SaveOutcome
from harness.config import TrainConfig
from harness.data import Loader, Task
from harness.dist import World, any_rank, barrier, gather, plain
from harness.records import StepRecord
from harness.runlog.names import Metric
from harness.stability import Ladder, StepGuard
from harness.stability.rank_table import rank_column
from harness.stop import StopRequest
from harness.training.black_box import BlackBox
from harness.training.callbacks import Callbacks, InFlight
from harness.training.counters import Counters
from harness.training.evaluate import evaluate, rehearse
from harness.training.garbage import GarbageCollection
from harness.training.journal import Journal
from harness.training.optim import set_learning_rate
from harness.training.progress import Phase, Progress
from harness.training.schedule import learning_rate
from harness.training.step import StepRunner
from harness.training.summary import Ending

__all__ = ["Run", "train_loop", "train_step"]


@dataclass(kw_only=True)
class Run:
    """All that takes part in a run; put together in `build`."""

    config: TrainConfig
    world: World
    directory: Path
    task: Task
    model: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
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
    callbacks: Callbacks
    """What is called at set points of the loop: the journal, and those of the user."""
    progress: Progress
    """What this rank is doing, for its watchdog."""
    black_box: BlackBox
    """What this rank remembers of its last steps."""
    in_flight: dict[int, InFlight] = field(default_factory=dict)
    """The steps whose records have not been handled, by number."""
    saved_step: int = -1
    """Finished steps at the last save; -1: what the run holds now was not saved."""
    ended_saves: deque[SaveOutcome] = field(default_factory=deque)
    """The saves that have ended on this rank, and of which the callbacks have not been told."""
    num_saves: int = 0
    """Of how many saves the callbacks have been told, in this attempt."""
    handled_samples: int = 0
    """Where the samples of the last step whose record was handled end in the order of the data."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The one that steps all parameters, or with Muon what Muon does not."""
        return self.optimizers[0]

    def learning_rate(self, step: int) -> float:
        """The schedule's value at `step`."""
        config = self.config
        return learning_rate(
            step, peak=config.optim.lr, num_steps=self.schedule_steps, schedule=config.schedule
        )

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Puts scalars into the run's log and its mirrors; rank 0's, other ranks' calls do nothing."""
        self.journal.scalars(step, values)


def train_loop(run: Run) -> Ending:
    """Trains until the last step, or until a rank was asked to stop; then commits a checkpoint.

    When it returns, no rank needs another one any more.

    Raises:
        InstabilityError: the ladder's last rung; on all ranks at the same step.
        CheckpointError: no checkpoint could be written for too long; on all ranks at the same step.
        ConfigError: DDP waited for the gradient of a parameter that took no part in the loss; on all ranks.
        TaskError: a callback raised something.
    """
    stopped = _any_asked_to_stop(run)
    if run.counters.step < run.config.loop.steps and not stopped:
        run.loader.start()
        rehearse(run.model, run.task, run.config, run.world, precision=run.precision)
        stopped = _evaluation_is_owed(run) and not _evaluate(run)
    with GarbageCollection(run.config.loop.gc_every) as garbage:
        while run.counters.step < run.config.loop.steps and not stopped:
            stopped = train_step(run)
            garbage.after_step(run.counters.step)
    run.runner.unused.refuse()
    ending = _finish(run, stopped)
    run.callbacks.on_end(run, ending.status)
    barrier()
    return ending


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
    set_learning_rate(run.optimizers, run.learning_rate(step))
    first_sample = run.loader.position
    run.progress.enter(Phase.DATA, step)
    run.black_box.begin(step, first_sample)
    micro_batches = run.loader.next()
    run.black_box.fetched(micro_batches)
    data_wait_s = time.perf_counter() - started
    compute_s = run.runner.run(step, micro_batches)
    run.progress.enter(Phase.UPDATE, step)
    run.guard.step(
        nominal_tokens=run.runner.nominal_tokens,
        compute_s=compute_s,
        data_wait_s=data_wait_s,
        stop_requested=run.stop.requested or bool(run.runner.unused.found),
        num_saves=run.num_saves + len(run.ended_saves),
    )
    run.progress.enter(Phase.RECORDS, step)
    if _is_due(run, run.config.tracking.histograms_every):
        run.journal.histograms(step, plain(run.model))
    for optimizer in run.optimizers:
        optimizer.zero_grad(set_to_none=True)
    run.in_flight[step] = InFlight(time.perf_counter() - started, (first_sample, run.loader.position))
    run.black_box.end(run.in_flight[step].step_s)
    run.counters.step = step + 1
    evaluating = _is_due(run, run.config.loop.eval_every)
    saving = _is_due(run, run.config.checkpoint.every)
    is_last = run.counters.step == run.config.loop.steps
    if evaluating or saving or is_last:
        run.guard.flush()
    stopped = _handle_records(run, run.guard.drain())
    if run.counters.step == step + 1:  # and not rolled back
        if evaluating and not stopped:
            stopped = not _evaluate(run)
        if saving and not stopped:  # a run that stops saves last thing
            _save(run)
    run.ended_saves.extend(run.checkpointer.outcomes())
    return stopped


def _is_due(run: Run, every: int) -> bool:
    return every > 0 and run.counters.step % every == 0


def _handle_records(run: Run, records: list[StepRecord]) -> bool:
    """Counts and logs finished steps and lets the ladder act, which may roll the run back; whether a rank was
    asked to stop."""
    stopped = False
    for record in records:
        run.counters.count(record)
        _tell_of_saves(run, int(rank_column(record.per_rank, "num_saves").min()) - run.num_saves)
        run.callbacks.on_step(run, record)
        run.handled_samples = run.in_flight.pop(record.step).samples[1]
        run.checkpointer.observe(record.step + 1, incident=record.reason is not None)
        stopped = stopped or bool(rank_column(record.per_rank, "stop_requested").any())
        if run.ladder.observe(record) == "rollback":
            break  # the records that follow are of the branch that was left
    return stopped


def _any_asked_to_stop(run: Run) -> bool:
    """The same on all ranks; a collective, for where no step is there to tell the others."""
    return any_rank(run.stop.requested)


def _evaluation_is_owed(run: Run) -> bool:
    """Whether the attempt before was stopped between a step and the evaluation after it."""
    return _is_due(run, run.config.loop.eval_every) and 0 < run.counters.step != run.counters.val_step


def _evaluate(run: Run) -> bool:
    """Evaluates; False if a rank was asked to stop before it was done, and then nothing has changed."""
    run.progress.enter(Phase.EVALUATION, run.counters.step - 1)
    interrupted = functools.partial(_any_asked_to_stop, run)
    with run.guard.watch_evaluation():
        metrics = evaluate(
            run.model, run.task, run.config, run.world, precision=run.precision, interrupted=interrupted
        )
    if metrics is None:
        return False
    run.counters.count_evaluation(metrics[Metric.VAL_LOSS])
    run.callbacks.on_eval(run, run.counters.step - 1, metrics)
    return True


def _save(run: Run, *, when_busy: Literal["wait", "drop"] | None = None) -> None:
    run.progress.enter(Phase.SAVE, run.counters.step - 1)
    metric = run.counters.last_val_loss
    if run.checkpointer.save(run.counters.step, run.saved, metric=metric, when_busy=when_busy):
        run.saved_step = run.counters.step


def _tell_of_saves(run: Run, count: int) -> None:
    """Tells of the next `count` saves that have ended, which all ranks know of by now."""
    for _ in range(count):
        run.num_saves += 1
        outcome = run.ended_saves.popleft()
        run.progress.learn(Phase.SAVE, outcome.seconds)
        run.callbacks.on_saved(run, outcome)


def _finish(run: Run, stopped: bool) -> Ending:
    """Handles the records that are left, evaluates a finished run, and commits the last checkpoint."""
    run.guard.flush()
    _handle_records(run, run.guard.drain())
    finished = run.counters.step >= run.config.loop.steps
    if finished and run.counters.val_step != run.counters.step:
        finished = not stopped and _evaluate(run)
    if run.counters.step != run.saved_step:
        _save(run, when_busy="wait")  # dropped, it would be missing for good
    run.progress.enter(Phase.SAVE, run.counters.step - 1)
    run.checkpointer.wait()
    run.progress.enter(Phase.END, run.counters.step)
    run.ended_saves.extend(run.checkpointer.outcomes())
    _tell_of_saves(run, len(run.ended_saves))
    asked = gather(lambda: (run.stop.reason, run.stop.is_done))
    return Ending.of_loop(finished=finished, asked=asked)
