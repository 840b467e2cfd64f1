"""Keeps a run's ledger: puts each second of this process into its class as it passes, on rank 0.

`Progress` tells when a phase is over; a step's time is put where it belongs once the step is over and its
record has arrived, as only that says whether it was skipped. Host side: nothing here synchronises.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from harness.runlog.ledger import Ledger, TimeClass
from harness.training.progress import At, Phase, Progress

__all__ = ["LedgerKeeper"]

WRITE_EVERY_S = 15.0
"""A process that is killed takes as much of its account with it: that counts as `restart`."""
WRITE_EARLY_S = 1.0
"""The same where it may be killed soon, or is at something that takes long: see `_EARLY`."""
NUM_FIRST = 5
"""Steps of a process until it is known how long one usually takes."""
NUM_USUAL = 33
STALL_RATIO = 3.0
"""A step that computes so many times longer than usual, and a second longer, has stalled."""
STALL_LEAST_S = 1.0

_CLASSES: Mapping[Phase, TimeClass] = {
    Phase.START: TimeClass.START,
    Phase.DATA: TimeClass.DATA,
    Phase.FORWARD: TimeClass.COMPUTE,
    Phase.BACKWARD: TimeClass.COMPUTE,
    Phase.UPDATE: TimeClass.COMPUTE,
    Phase.RECORDS: TimeClass.COMPUTE,
    Phase.EVALUATION: TimeClass.EVALUATION,
    Phase.SAVE: TimeClass.CHECKPOINT,
    Phase.ROLLBACK: TimeClass.RESTART,
    Phase.END: TimeClass.CHECKPOINT,
}
_EARLY = (Phase.EVALUATION, Phase.SAVE, Phase.ROLLBACK, Phase.END)
"""A run that is asked to stop comes to one of these first."""
_OF_STEPS = (TimeClass.COMPUTE, TimeClass.DATA)


@dataclass(slots=True, eq=False)
class _Step:
    """A step that has not been put into its class."""

    spent: dict[TimeClass, float]
    """Seconds of `compute` and `data`, without what was longer than usual."""
    is_again: bool
    is_skipped: bool | None = None
    """None: its record has not arrived."""
    is_over: bool = False

    def classed(self) -> dict[TimeClass, float]:
        """Its seconds by class, as far as is known."""
        if not (self.is_again or self.is_skipped):
            return self.spent
        return {TimeClass.RECOMPUTED if self.is_again else TimeClass.SKIPPED: sum(self.spent.values())}


class LedgerKeeper:
    """The account of a run while this process trains.

    Args:
        progress: What the training thread does; in its first phase, whose begin is that of the process.
        before: The account of the attempts before, if there were any.
        write: Appends an account to the log.
    """

    def __init__(self, progress: Progress, before: Ledger | None, write: Callable[[Ledger], None]) -> None:
        self._progress = progress
        self._write = write
        self._mutex = threading.Lock()  # at a hang the watchdog's thread makes the last account
        self._seconds = dict.fromkeys(TimeClass, 0.0)
        self._made = self._made_before = 0
        self._steps: dict[int, _Step] = {}
        self._usual: deque[float] = deque(maxlen=NUM_USUAL)
        self._first: list[_Step] = []
        self._suspended_s = _suspended_s()
        self._written_at = progress.at.since
        self._early_s = 0.0
        """Of this process's begin lies before the last sign of the one before, and is counted there."""
        if before is not None:
            self._go_on(before)
        progress.when_left = self._left
        self.write()

    def _go_on(self, before: Ledger) -> None:
        self._seconds.update(before.seconds)
        self._made = self._made_before = before.steps_made
        begin = time.time() - (time.monotonic() - self._progress.at.since)
        gap_s = begin - before.until
        self._early_s = max(0.0, -gap_s)
        if not before.is_finished:
            self._seconds[TimeClass.RESTART] += max(0.0, gap_s)

    def count(self, step: int, *, is_skipped: bool) -> None:
        """The record of `step` has arrived."""
        with self._mutex:
            if step in self._steps:
                self._steps[step].is_skipped = is_skipped
                self._settle()

    def roll_back(self) -> None:
        """Steps in flight are dropped; all that were made from here on are made again."""
        with self._mutex:
            for step in self._steps.values():
                step.is_skipped = bool(step.is_skipped)
            self._settle()
            self._made_before = self._made

    def close(self, *, is_finished: bool = False, hangs: bool = False) -> None:
        """Writes the last account. On any thread.

        Args:
            hangs: What the training thread is at will never end.
        """
        with self._mutex:
            at, now = self._progress.at, time.monotonic()
            self._progress.when_left = None
            if hangs:
                self._seconds[TimeClass.STALLED] += now - at.since
            else:
                self._take(at, now - at.since)
            for step in self._first:
                self._cut(step, TimeClass.START)
            for step in self._steps.values():
                if not step.is_over:
                    self._cut(step, TimeClass.STALLED)
        self.write(is_finished=is_finished, has_ended=True)

    def write(self, *, is_finished: bool = False, has_ended: bool = False) -> None:
        """Writes the account up to now, the phase that is not over included."""
        with self._mutex:
            now, at = time.monotonic(), self._progress.at
            seconds = dict(self._seconds)
            for step in self._steps.values():
                for kind, spent in step.classed().items():
                    seconds[kind] += spent
            if not has_ended:
                seconds[_CLASSES[at.phase]] += now - at.since
            seconds[TimeClass.START] = max(0.0, seconds[TimeClass.START] - self._early_s)
            seconds[TimeClass.STALLED] += max(0.0, _suspended_s() - self._suspended_s)
            self._written_at = now
        until = time.time()
        self._write(Ledger(seconds=seconds, until=until, steps_made=self._made, is_finished=is_finished))

    def _left(self, at: At, now: float) -> None:
        """A phase is over; on the training thread, some microseconds."""
        with self._mutex:
            self._take(at, now - at.since)
            if at.phase is Phase.RECORDS:
                self._end_step(at.step)
                self._settle()
        every_s = WRITE_EARLY_S if self._progress.at.phase in _EARLY else WRITE_EVERY_S
        if now - self._written_at >= every_s:
            self.write()

    def _take(self, at: At, took_s: float) -> None:
        kind = _CLASSES[at.phase]
        if kind not in _OF_STEPS:
            self._seconds[kind] += took_s
            return
        if at.step not in self._steps:
            self._steps[at.step] = _Step(dict.fromkeys(_OF_STEPS, 0.0), at.step < self._made_before)
        self._steps[at.step].spent[kind] += took_s

    def _end_step(self, number: int) -> None:
        step = self._steps[number]
        if step.is_over:
            return
        step.is_over = True
        self._made = max(self._made, number + 1)
        self._usual.append(step.spent[TimeClass.COMPUTE])
        if len(self._usual) > NUM_FIRST:
            self._cut(step, TimeClass.STALLED)
            return
        self._first.append(step)
        if len(self._usual) == NUM_FIRST:
            for first in self._first:
                self._cut(first, TimeClass.START)
            self._first.clear()

    def _cut(self, step: _Step, kind: TimeClass) -> None:
        """Puts what a step takes longer than usual into a class of its own."""
        if not self._usual:
            return
        usual_s = sorted(self._usual)[len(self._usual) // 2]
        took_s = step.spent[TimeClass.COMPUTE]
        if took_s > max(STALL_RATIO * usual_s, usual_s + STALL_LEAST_S):
            step.spent[TimeClass.COMPUTE] = usual_s
            self._seconds[kind] += took_s - usual_s

    def _settle(self) -> None:
        """Puts steps of which all is known into their classes."""
        for number, step in list(self._steps.items()):
            if step.is_over and step.is_skipped is not None and step not in self._first:
                for kind, spent in step.classed().items():
                    self._seconds[kind] += spent
                del self._steps[number]


def _suspended_s() -> float:
    """How long the machine has been suspended since it was started; the monotonic clock stands still then."""
    return (
        time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic() if hasattr(time, "CLOCK_BOOTTIME") else 0.0
    )
