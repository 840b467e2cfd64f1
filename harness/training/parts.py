"""The training loss of each part of the data, such as the sources of a mixture."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from harness.data import LossSum
from harness.errors import ConfigError
from harness.runlog.names import Metric
from harness.stability import Check, Reading
from harness.stability.checks.base import Arrived, StepView

__all__ = ["PartLosses"]


class PartLosses(Check):
    """`train/loss/PART` of each part that has a token in the step, equal on all ranks.

    The sums travel in the step's one gather, so nothing waits for the device.

    Args:
        parts: Their names; none: nothing is measured.
    """

    name = "part losses"

    def __init__(self, parts: Sequence[str]) -> None:
        self.every = 1 if parts else 0
        self._parts = tuple(parts)
        self._sums: Tensor | None = None

    def add(self, loss: LossSum) -> None:
        """Notes a micro-batch of the step at hand.

        Raises:
            ConfigError: its sums are not those of the parts.
        """
        if not self._parts or loss.by_part is None:
            return
        if loss.by_part.shape != (len(self._parts), 2):
            raise ConfigError(
                f"LossSum.by_part has the shape {list(loss.by_part.shape)}",
                rule=f"it holds total and count of each of the task's {len(self._parts)} parts",
            )
        sums = loss.by_part.detach().double()
        self._sums = sums if self._sums is None else self._sums + sums

    def measure(self, view: StepView) -> Tensor:
        """`[parts, 2]`, total and count of each; zeros where the loss does not tell them."""
        sums, self._sums = self._sums, None
        return view.rows.new_zeros(len(self._parts), 2) if sums is None else sums

    def read(self, numbers: Tensor, arrived: Arrived) -> Reading:
        """Of `[W, parts, 2]`."""
        sums = zip(self._parts, numbers.sum(0).tolist(), strict=True)
        return Reading(
            values={f"{Metric.TRAIN_LOSS}/{name}": total / count for name, (total, count) in sums if count}
        )

    def forget(self) -> None:
        self._sums = None
