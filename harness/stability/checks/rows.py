"""Statistics of each parameter's gradient; of an incident they are there whatever the cadence."""

from __future__ import annotations

import logging
import math

import torch.distributed as dist
from torch import Tensor, nn

from harness.config import GuardConfig
from harness.records import ParameterRow
from harness.stability.checks.base import Arrived, Check, Reading, StepView
from harness.stability.layout import MAX_ABS, NUM_COLUMNS, NUM_INF, NUM_NAN, NUM_ZERO, SUM_SQUARES
from harness.stability.optimizers import Optimizers
from harness.stability.packing import can_be_gathered

__all__ = ["ROWS", "RowsCheck", "rows_of_rank"]

logger = logging.getLogger(__name__)

ROWS = "rows"


class RowsCheck(Check):
    """Fills `StepRecord.per_parameter`."""

    name = ROWS

    def __init__(self, config: GuardConfig) -> None:
        self.every = config.per_parameter_every

    def attach(self, model: nn.Module, optimizers: Optimizers) -> None:
        """Leaves the rows out where those of all ranks would be too many for each of them."""
        num_ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        num_values = (NUM_COLUMNS + 1) * sum(parameter.requires_grad for parameter in model.parameters())
        if self.every and not can_be_gathered(num_values, num_ranks=num_ranks):
            self.every = 0
            logger.warning(
                "statistics of each parameter are left out: those of %d ranks would be %.1f GB on each rank",
                num_ranks,
                8e-9 * num_values * num_ranks,
            )

    def measure(self, view: StepView) -> Tensor:
        return view.rows

    def read(self, numbers: Tensor, arrived: Arrived) -> Reading:
        """Of `[W, P, 6]`."""
        # Replicas hold the same reduced gradient; the shards of the first make up the whole.
        shards = numbers.view(arrived.num_replicas, -1, *numbers.shape[1:])[0]
        # Behind the NUM_COLUMNS of a rank's own gradient stands the reduced gradient's sum of squares.
        norms = (shards[:, :, NUM_COLUMNS].sum(0).sqrt() / arrived.divisor).tolist()
        totals = numbers.sum(0).tolist()
        largest = (numbers[:, :, MAX_ABS].amax(0) / arrived.divisor).tolist()
        rows = {
            name: ParameterRow(
                grad_norm=norms[row],
                max_abs=largest[row],
                num_nan=_count(totals[row][NUM_NAN]),
                num_inf=_count(totals[row][NUM_INF]),
                num_zero=_count(totals[row][NUM_ZERO]),
                num_elements=arrived.layout.sizes[row],
            )
            for row, name in enumerate(arrived.layout.names)
        }
        return Reading(fields={"per_parameter": rows})


def rows_of_rank(numbers: Tensor, rank: int, arrived: Arrived) -> dict[str, ParameterRow]:
    """What one rank's own gradient was before the reduction, by parameter, of `[W, P, 6]` on the host."""
    rows = numbers[rank].tolist()
    return {
        name: ParameterRow(
            grad_norm=math.sqrt(row[SUM_SQUARES]) / arrived.divisor,
            max_abs=row[MAX_ABS] / arrived.divisor,
            num_nan=_count(row[NUM_NAN]),
            num_inf=_count(row[NUM_INF]),
            num_zero=_count(row[NUM_ZERO]),
            num_elements=size,
        )
        for name, size, row in zip(arrived.layout.names, arrived.layout.sizes, rows, strict=True)
    }


def _count(value: float) -> int:
    """A count as an integer; -1: not measured."""
    return -1 if math.isnan(value) else int(value)
