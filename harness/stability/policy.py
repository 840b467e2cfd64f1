"""The ladder: what becomes of a run whose numbers cannot be trusted.

    skip (the guard, on the device)  ->  roll back  ->  stop with a report

Every rung is bounded, cooled down and logged, and taken on all ranks at the same step.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch.distributed as dist

from harness.config import GuardConfig
from harness.errors import InstabilityError
from harness.records import StepRecord
from harness.stability.incidents import Incident, report

__all__ = ["Action", "Ladder", "say"]

Action = Literal["go_on", "rollback"]

WINDOW = 100
"""Steps over which the share of skipped ones is taken."""

REMEMBERED = 20
"""Incidents that the final report lists."""

logger = logging.getLogger(__name__)


class Ladder:
    """Watches the records of a run, all of them and in order, and climbs when skipping does not help.

    Records are equal on all ranks, and so is what follows from them. A run is in trouble after more than
    `max_consecutive_skips` skipped steps in a row, or when more than `max_skip_frac` of the last 100 steps
    were skipped. Then it is rolled back, if the caller can do that, at most `max_rollbacks` times and not
    within `rollback_cooldown_steps` applied steps of the last time; else it ends. A skip that a smaller fp16
    loss scale may cure counts for nothing.

    Args:
        rollback: Brings the run back to its last healthy checkpoint and past the data that broke it; False if
            there is none. Called on all ranks at the same step.
    """

    def __init__(self, config: GuardConfig, *, rollback: Callable[[StepRecord], bool] | None = None) -> None:
        self._config = config
        self._rollback = rollback
        self._incidents: deque[Incident] = deque(maxlen=REMEMBERED)
        self._recent: deque[bool] = deque(maxlen=WINDOW)
        self.num_skips = 0
        self.num_consecutive_skips = 0
        self.num_rollbacks = 0
        self._num_applied_since_rollback = config.rollback_cooldown_steps

    def observe(self, record: StepRecord | None) -> Action:
        """Takes the next record (None: of a step that was applied, without a reason to say anything); says
        whether the run was rolled back.

        Raises:
            InstabilityError: the last rung, with a report of the latest incidents.
        """
        if record is None:
            self._count(skipped=False, may_be_cured=False)
            return "go_on"
        incident = Incident.of(record)
        if incident is not None:
            self._incidents.append(incident)
            say(incident.summary())
        self._count(skipped=record.skipped, may_be_cured=_loss_scale_may_cure(record))
        self._refuse(record)
        trouble = self._trouble() if record.skipped else None
        return self._climb(record, trouble) if trouble else "go_on"

    def state_dict(self) -> dict[str, Any]:
        """The counters, as plain data."""
        return {
            "recent": [int(skipped) for skipped in self._recent],
            "num_skips": self.num_skips,
            "num_consecutive_skips": self.num_consecutive_skips,
            "num_rollbacks": self.num_rollbacks,
            "num_applied_since_rollback": self._num_applied_since_rollback,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        self._recent = deque(map(bool, state["recent"]), maxlen=WINDOW)
        self.num_skips = state["num_skips"]
        self.num_consecutive_skips = state["num_consecutive_skips"]
        self.num_rollbacks = state["num_rollbacks"]
        self._num_applied_since_rollback = state["num_applied_since_rollback"]

    def _count(self, *, skipped: bool, may_be_cured: bool) -> None:
        if skipped:
            self.num_skips += 1
        else:
            self._num_applied_since_rollback += 1
            self.num_consecutive_skips = 0
        counts = skipped and not may_be_cured
        self._recent.append(counts)
        self.num_consecutive_skips += counts

    def _refuse(self, record: StepRecord) -> None:
        """Ends the run at once where the configuration bears no such step."""
        if record.verdict == "stop":
            raise self._error("a step was not finite and guard.nonfinite is 'stop'")
        if record.replicas_differ and self._config.replicas == "stop":
            raise self._error("the replicas differ and guard.replicas is 'stop'")

    def _trouble(self) -> str | None:
        if self.num_consecutive_skips > self._config.max_consecutive_skips:
            return f"{self.num_consecutive_skips} steps in a row were skipped"
        skipped = sum(self._recent)
        if len(self._recent) == WINDOW and skipped > self._config.max_skip_frac * WINDOW:
            return f"{skipped} of the last {WINDOW} steps were skipped"
        return None

    def _climb(self, record: StepRecord, trouble: str) -> Action:
        if self._rollback is None:
            raise self._error(trouble)
        if self.num_rollbacks >= self._config.max_rollbacks:
            raise self._error(f"{trouble}, after {self.num_rollbacks} rollbacks")
        if self._num_applied_since_rollback < self._config.rollback_cooldown_steps:
            raise self._error(f"{trouble}, {self._num_applied_since_rollback} steps after a rollback")
        num_rollbacks, num_skips = self.num_rollbacks, self.num_skips
        if not self._rollback(record):
            raise self._error(f"{trouble}, and there is no healthy checkpoint to go back to")
        # Whatever was loaded with the rest, rollbacks and skips are not undone.
        self.num_rollbacks, self.num_skips = num_rollbacks + 1, num_skips
        self._recent.clear()
        self.num_consecutive_skips = self._num_applied_since_rollback = 0
        say(f"rolled back at step {record.step} (rollback {self.num_rollbacks}): {trouble}")
        return "rollback"

    def _error(self, problem: str) -> InstabilityError:
        return InstabilityError(
            f"{problem}\n{report(self._incidents)}\n",
            rule="a run goes on only while its numbers can be trusted",
            remedy="look at the data of these steps, lower the learning rate, or resume from before them",
        )


def _loss_scale_may_cure(record: StepRecord) -> bool:
    is_overflow = math.isfinite(record.loss) and not record.is_spike and not record.undone
    return record.loss_scale > 1.0 and is_overflow


def say(message: str) -> None:
    """A warning in the log, once for all ranks: records are equal on all of them."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        logger.warning("%s", message)
