"""What a rank is doing now, and how long it usually takes: written by the training thread, read by others."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

from harness.data import num_signs

__all__ = ["At", "Phase", "Progress"]

_FORGOTTEN = 0.99
"""What is kept of the slowest time at each further one: an odd one is forgotten after some hundred."""


class Phase(StrEnum):
    """What the training thread does; the value is how people are told."""

    START = "starting"
    DATA = "waiting for the batch"
    FORWARD = "in the forward pass"
    BACKWARD = "in the backward pass"
    UPDATE = "in the update"
    RECORDS = "handling the records, callbacks included,"
    EVALUATION = "evaluating"
    SAVE = "saving a checkpoint"
    ROLLBACK = "rolling back"
    END = "ending"


class At(NamedTuple):
    """Where a rank is."""

    phase: Phase
    step: int
    order: int
    """Phases entered before: all ranks enter the same ones in the same order, so the lowest is behind."""
    since: float
    """`time.monotonic()`; it stands still while a machine is suspended."""


class Progress:
    """One rank's. `enter` takes some microseconds, and synchronises nothing.

    Args:
        begun: When the program was started, by `time.monotonic()`; default: now.
    """

    def __init__(self, *, begun: float | None = None) -> None:
        self.at = At(Phase.START, 0, 0, time.monotonic() if begun is None else begun)
        self.when_left: Callable[[At, float], None] | None = None
        """Called by `enter` with the phase that is over, and the moment."""
        self.num_done: Counter[Phase] = Counter()
        """How often each phase has come to its end."""
        self.slowest_s: dict[Phase, float] = {}
        """The longest that it took lately."""
        self.signs_of_life: Callable[[], int] = num_signs
        """A number that grows while something is done that takes long within a phase: data prepared, what
        the thread that saves has written."""

    def enter(self, phase: Phase, step: int) -> None:
        """The phase before is over, and `phase` begins; on the training thread."""
        now, before = time.monotonic(), self.at
        self.learn(before.phase, now - before.since)
        self.num_done[before.phase] += 1
        self.at = At(phase, step, before.order + 1, now)
        if self.when_left is not None:
            self.when_left(before, now)

    def resume(self, step: int) -> None:
        """What starts goes on at that step."""
        self.at = self.at._replace(step=step)

    def learn(self, phase: Phase, took_s: float) -> None:
        """A phase took so long, or what it began: who enters it next may have to wait for the end of that."""
        self.slowest_s[phase] = max(took_s, _FORGOTTEN * self.slowest_s.get(phase, 0.0))
