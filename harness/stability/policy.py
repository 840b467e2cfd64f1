"""The ladder: what becomes of a run whose steps are skipped again and again."""

from __future__ import annotations

import logging
import math
from typing import Literal

from harness.config import GuardConfig
from harness.errors import InstabilityError
from harness.records import StepRecord

__all__ = ["Action", "Ladder"]

Action = Literal["go_on", "rollback"]

logger = logging.getLogger(__name__)


class Ladder:
    """Watches the records of a run and climbs: skip, roll back, stop.

    Records are equal on all ranks, and so is what is done about them, at the same step everywhere. Up to
    `max_consecutive_skips` skipped steps in a row are borne; one more ends the run, or rolls it back if the
    caller can. A skip that a smaller fp16 loss scale may cure is not counted.
    """

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self.num_consecutive_skips = 0

    def observe(self, record: StepRecord) -> Action:
        """Takes one record, in order.

        Raises:
            InstabilityError: the last rung; names step, rank, parameter and micro-batch.
        """
        if record.verdict == "stop":
            raise _stopped(record, f"step {record.step} was not finite and guard.nonfinite is 'stop'")
        if not record.skipped:
            self.num_consecutive_skips = 0
        elif not _loss_scale_may_cure(record):
            self.num_consecutive_skips += 1
            logger.warning("step %d skipped: %s", record.step, record.reason)
        if self.num_consecutive_skips > self._config.max_consecutive_skips:
            raise _stopped(record, f"{self.num_consecutive_skips} steps in a row were skipped")
        return "go_on"


def _loss_scale_may_cure(record: StepRecord) -> bool:
    return record.loss_scale > 1.0 and math.isfinite(record.loss)


def _stopped(record: StepRecord, problem: str) -> InstabilityError:
    where = [f"step {record.step}"]
    where += [] if record.rank is None else [f"rank {record.rank}"]
    where += [] if record.micro_batch is None else [f"micro-batch {record.micro_batch}"]
    where += [] if record.parameter is None else [f"parameter {record.parameter}"]
    return InstabilityError(
        f"{problem}; the last at {', '.join(where)}: {record.reason}",
        rule="a run goes on only while its numbers can be trusted",
        remedy="look at the data of that step, lower the learning rate, or resume from an earlier checkpoint",
    )
