"""The black box of a rank: its last steps, in memory, and in `incidents/step-N/` once something goes wrong.

```
train_step:  begin      states of the random number generators, before anything is drawn
             fetched    the micro-batches
             end        the step's time
             on_step    its record; an incident is handed to a thread, on all ranks at the same step
the end:     end_with   a crash or a failed allocation; each rank for itself
             end_hung   in the watchdog's thread; each rank for itself
```

Nothing here synchronises with a device or calls a collective.
"""

from __future__ import annotations

import logging
import traceback
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import torch

from harness.checkpoint.tasks import Tasks
from harness.config import TrainConfig
from harness.data import Batch, Dataset, Loader
from harness.dist import World
from harness.errors import InstabilityError, LostRankError
from harness.records import RankRow, StepRecord
from harness.training.callbacks import Callback, Rollback, Training
from harness.training.counters import incident_kind
from harness.training.incident_report import open_writer
from harness.training.incident_writer import Found, HeldStep, IncidentWriter
from harness.training.progress import Phase, Progress
from harness.training.rng_states import HeldRng
from harness.training.stacks import arose_waiting
from harness.training.step_profiler import StepProfiler

__all__ = ["BlackBox", "open_black_box"]

logger = logging.getLogger(__name__)

_MOST_IN_WINDOW = 8
_WINDOW_STEPS = 100
"""Of a run that goes from one incident to the next the first ones of each window are kept: they explain most,
and are not pushed out by those that follow from them."""
_CLOSE_S = 20.0
"""How long the end of a run waits for what is still being written."""
_CPU_ALLOCATION = "DefaultCPUAllocator"
"""By its name in the message: on the CPU torch raises a plain RuntimeError."""


_OF_STEPS = (Phase.DATA, Phase.FORWARD, Phase.BACKWARD, Phase.UPDATE, Phase.RECORDS)
"""In which something happens to a step, and so to its samples."""


class BlackBox(Callback):
    """Remembers, and has written down what went wrong.

    Args:
        writer: None: nothing is remembered.
    """

    def __init__(
        self, config: TrainConfig, world: World, progress: Progress, writer: IncidentWriter | None
    ) -> None:
        self._config = config.incidents
        self._rank, self._device = world.rank, world.device
        self._progress = progress
        self._writer = writer
        self._profiler = StepProfiler(config.incidents, world.device)
        self._tasks = Tasks("writing down an incident", thread="incident-writer")
        # A step is in the ring until its verdict has come, however few are to be remembered.
        length = max(config.incidents.remember_steps, config.guard.lag_steps + 2)
        self._ring: deque[HeldStep] = deque(maxlen=length)
        self._kept: deque[int] = deque(maxlen=_MOST_IN_WINDOW)
        """The steps of the last incidents that were written down; the same on all ranks."""

    def begin(self, step: int, position: int) -> None:
        """A step begins; `position` is that of its first sample in the order of the data."""
        if self._writer is None:
            return
        self._ring.append(HeldStep(step, position, HeldRng.take(self._device)))
        self._profiler.begin(step)

    def fetched(self, batches: Sequence[Batch]) -> None:
        """The loader has handed out the step's micro-batches."""
        if self._ring:
            self._ring[-1].batches = batches

    def end(self, step_s: float) -> None:
        """The step is made, and its record on the way."""
        if self._writer is None:
            return
        held = self._ring[-1]
        held.step_s = step_s
        if not (self._config.save_batch or self._config.rerun == "on"):
            held.batches = ()
        trace = self._profiler.end()
        if trace is not None:
            writer = self._writer
            self._tasks.add(lambda: writer.write_trace(trace))

    def held(self, step: int) -> HeldStep | None:
        """What is remembered of a step, the newest where a rollback made it twice."""
        return next((held for held in reversed(self._ring) if held.step == step), None)

    def on_step(self, run: Training, record: StepRecord) -> None:
        if self._writer is None:
            return
        self._remember(record, record.per_rank[self._rank])
        reason = record.reason or "; ".join(finding.summary() for finding in record.findings)
        if reason:
            kind = incident_kind(record) or "check"
            self.keep(Found(step=record.step, kind=kind, reason=reason, record=record))
        for held in self._ring:
            if held.step == record.step:
                held.batches = ()

    def on_rollback(self, run: Training, rollback: Rollback) -> None:
        for held in self._ring:  # records of the branch that was left do not come
            held.batches = ()

    def keep(self, found: Found) -> None:
        """Has an incident written down. On all ranks at the same step, with the same values."""
        recent = [step for step in self._kept if abs(found.step - step) < _WINDOW_STEPS]
        if self._writer is None or found.step in recent[-1:] or len(recent) == _MOST_IN_WINDOW:
            return
        self._kept.append(found.step)
        if self._config.profile_after:
            self._profiler.follow(found.step)
        writer, steps = self._writer, self._snapshot()
        self._tasks.add(lambda: writer.write(found, steps, overwrite=self._rank == 0))

    def end_with(self, error: BaseException | None, model: torch.nn.Module) -> None:
        """What ended the loop on this rank. Incidents that ended the run were kept when they were found."""
        if self._writer is None or not isinstance(error, Exception) or isinstance(error, InstabilityError):
            return
        at = self._progress.at
        is_out = _is_out_of_memory(error)
        ranks = _blamed(error, self._rank)
        found = Found(
            step=at.step,
            kind="out of memory" if is_out else "crash",
            reason=str(error) or type(error).__name__,
            ranks=ranks,
            error=f"{type(error).__name__}: {error}",
            phase=str(at.phase),
            is_in_step=at.phase in _OF_STEPS,
            stacks="".join(traceback.format_exception(error)),
        )
        writer, steps, is_own = self._writer, self._snapshot(), ranks == (self._rank,)
        if is_out:
            writer.write_memory(
                at.step, model, self._device
            )  # now, as closing the run frees what it is about
        self._tasks.add(lambda: writer.write(found, steps, overwrite=is_own))

    def end_hung(self, error: LostRankError) -> None:
        """The run hangs; in the watchdog's thread, which has seconds."""
        if self._writer is None:
            return
        at, writer = self._progress.at, self._writer
        found = Found(
            step=at.step,
            kind="hang",
            reason=error.problem,
            ranks=error.ranks or (),
            phase=str(at.phase),
            is_in_step=at.phase in _OF_STEPS,
            hang_folder=error.stacks,
        )
        writer.write(found, self._snapshot(), overwrite=self._rank == 0)

    def close(self) -> None:
        """Waits, not for ever, for what is still being written."""
        if not self._tasks.join(timeout_s=_CLOSE_S):
            logger.warning("incidents/ is incomplete: its files could not be written within %g s", _CLOSE_S)

    def _snapshot(self) -> list[HeldStep]:
        return [held.copy() for held in tuple(self._ring)]

    def _remember(self, record: StepRecord, row: RankRow) -> None:
        held = self.held(record.step)
        if held is not None:
            held.verdict, held.row = record.verdict, row


def open_black_box(
    config: TrainConfig, world: World, progress: Progress, directory: Path, loader: Loader, data: Dataset
) -> BlackBox:
    """This rank's. On all ranks; two collectives on the host."""
    return BlackBox(config, world, progress, open_writer(config, world, directory, loader, data))


def _blamed(error: Exception, rank: int) -> tuple[int, ...]:
    """The ranks whose fault an error of `rank` is; empty if it is that of others, and not known of whom."""
    if isinstance(error, LostRankError):
        return tuple(error.ranks or ())
    return () if arose_waiting(error) and not _is_out_of_memory(error) else (rank,)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, also where a user's code was wrapped around it."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return any(
        isinstance(one, (torch.OutOfMemoryError, MemoryError))
        or (isinstance(one, RuntimeError) and _CPU_ALLOCATION in str(one))
        for one in chain
    )
