"""Checks for silent errors that need the whole run: its task, its speed.

What they find follows from records, which are equal on all ranks; the main rank says it.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Mapping

from harness.config import TrainConfig
from harness.records import Finding, StepRecord
from harness.runlog.names import Metric
from harness.training.callbacks import Callback, Rollback, Training
from harness.training.journal import Journal, finding_event

__all__ = ["RunChecks", "first_loss_problem", "held_out_problem"]

logger = logging.getLogger(__name__)

FIRST_LOSS = (0.4, 2.5)
"""What the first loss may be, times ln(classes), which a model has that knows nothing yet."""

WINDOW_STEPS = 50
SLOWER = 2.0
"""Times the shortest median step so far that the median of a window may take."""

FARTHER = 3.0
"""Times the loss of training that a held-out loss may be as long as no sample has come again."""

NUM_LOSSES = 11
"""Of training, whose median a held-out loss is compared with."""

NUM_SLOW_WINDOWS = 3
"""In a row; fewer are an evaluation, a checkpoint or a neighbour."""


class RunChecks(Callback):
    """The first loss, the first held-out losses and the speed; each said once."""

    def __init__(self, config: TrainConfig, journal: Journal) -> None:
        self._classes = config.model.vocab_size if config.task == "text" else None
        self._journal = journal
        self._said: set[str] = set()
        self._losses: deque[float] = deque(maxlen=NUM_LOSSES)
        self._first_loss = math.nan
        self.found: list[Finding] = []
        self._begin_window()
        self._shortest_s = math.inf
        self._num_slow, self._is_main = 0, True

    def on_step(self, run: Training, record: StepRecord) -> None:
        self._is_main = run.world.is_main
        self._losses.append(record.loss)
        if record.step == 0:
            self._first_loss = record.loss
        if record.step == 0 and self._classes is not None:
            problem = first_loss_problem(record.loss, self._classes)
            remedy = "look at the initialisation (far above), or at labels that the model can see (far below)"
            if problem is not None:
                self._say("first loss", problem, remedy, 0)
        self._step_s.append(run.in_flight[record.step].step_s)
        if len(self._step_s) == WINDOW_STEPS:
            self._check_speed(record.step)

    def on_eval(self, run: Training, step: int, metrics: Mapping[str, float]) -> None:
        in_first_epoch = run.loader.position <= len(run.task.train_data)
        if not in_first_epoch or len(self._losses) < NUM_LOSSES:
            return
        problem = held_out_problem(
            metrics[Metric.VAL_LOSS], statistics.median(self._losses), first_loss=self._first_loss
        )
        if problem is not None:
            remedy = "let harness doctor compare both modes; look at where the held-out data comes from"
            self._say("held-out loss", problem, remedy, step)

    def on_rollback(self, run: Training, rollback: Rollback) -> None:
        self._begin_window()

    def _begin_window(self) -> None:
        self._step_s: deque[float] = deque()

    def _check_speed(self, step: int) -> None:
        median_s = statistics.median(self._step_s)
        self._begin_window()
        self._num_slow = self._num_slow + 1 if median_s > SLOWER * self._shortest_s else 0
        if self._num_slow == NUM_SLOW_WINDOWS:
            self._say(
                "speed",
                f"a step takes {1000 * median_s:.0f} ms, and took {1000 * self._shortest_s:.0f} ms before",
                "look at data wait, other programs on the machine, clocks and temperatures (harness doctor)",
                step,
            )
        self._shortest_s = min(self._shortest_s, median_s)

    def _say(self, check: str, problem: str, remedy: str, step: int) -> None:
        if check in self._said:
            return
        self._said.add(check)
        finding = Finding(check=check, problem=problem, remedy=remedy)
        self._journal.event(finding_event(finding), step)
        if self._is_main:
            logger.warning("step %d: %s", step, finding.summary())
        self.found.append(finding)


def first_loss_problem(loss: float, classes: int) -> str | None:
    """What is wrong with the loss of a model that knows nothing yet; None: nothing."""
    usual = math.log(classes)
    if FIRST_LOSS[0] * usual < loss < FIRST_LOSS[1] * usual or not math.isfinite(loss):
        return None
    return f"the first loss is {loss:.3g}, and ln({classes}) = {usual:.3g} is what guessing gives"


def held_out_problem(held_out: float, of_training: float, *, first_loss: float) -> str | None:
    """What is wrong with a held-out loss while the model has not seen any sample twice; None: nothing."""
    is_far = held_out > FARTHER * of_training and held_out - of_training > 0.1 * first_loss
    if not is_far or math.isnan(first_loss):
        return None
    return f"the held-out loss is {held_out:.3g} and that of training {of_training:.3g}, in the first epoch"
