"""Rank statistics: what one rank knows of its share of a step, as `[17]` float64, before anything is decided.

Legend: P parameters, W ranks. Everything stays on the device; nothing here synchronises.
"""

from __future__ import annotations

from enum import IntFlag

import torch
from torch import Tensor

from harness.stability.layout import MAX_ABS, NUM_COLUMNS, NUM_INF, NUM_NAN, SUM_SQUARES

__all__ = [
    "COMPUTE_S",
    "CORRECT",
    "DATA_WAIT_S",
    "FAULTS",
    "LOSS_SUM",
    "MICRO_BATCH",
    "NUM_FIELDS",
    "NUM_HOST_FIELDS",
    "NUM_SAVES",
    "PARAMETER",
    "REDUCED_BAD",
    "REDUCED_SUM_SQUARES",
    "STOP_REQUESTED",
    "TOKENS",
    "Fault",
    "bad_rows",
    "build_rank_statistics",
]

# Fields 0 to 4 are the columns of a row of statistics, summed (max-abs: maximised) over the parameters.
(
    LOSS_SUM,
    TOKENS,
    CORRECT,
    PARAMETER,
    MICRO_BATCH,
    REDUCED_SUM_SQUARES,
    REDUCED_BAD,
    FAULTS,
    COMPUTE_S,
    DATA_WAIT_S,
    STOP_REQUESTED,
    NUM_SAVES,
) = range(NUM_COLUMNS, NUM_COLUMNS + 12)
NUM_FIELDS = NUM_COLUMNS + 12

NUM_HOST_FIELDS = NUM_FIELDS - FAULTS
"""The fields from FAULTS on are known on the host."""


class Fault(IntFlag):
    """What is wrong with a rank's step besides its numbers; a step with any of them is not applied."""

    UNREDUCED = 1
    """The gradients were not reduced."""
    NO_GRADIENT = 2
    """There are none."""
    IGNORED_SKIP = 4
    """An optimizer changed parameters in an earlier step that was to be left out."""
    IGNORED_CLIP = 8
    """An optimizer did not divide gradients in an earlier step that was to be clipped."""


def build_rank_statistics(
    local: Tensor, reduced: Tensor, *, loss: Tensor, micro_batch: Tensor, host_fields: Tensor
) -> Tensor:
    """This rank's statistics, `[NUM_FIELDS]` float64.

    Args:
        local: `[P, 5]` statistics of this rank's own gradient, before the reduction.
        reduced: `[P, 5]` statistics of what the optimizer will use here: the reduced gradient or its shard.
        loss: `[3]` sum of the loss, number of tokens, and how many of them were predicted right.
        micro_batch: 0-d, the one to blame if the step goes wrong.
        host_fields: `[NUM_HOST_FIELDS]`, the fields from FAULTS on.
    """
    totals = local.sum(0)
    totals[MAX_ABS] = local[:, MAX_ABS].amax()
    local_bad, reduced_bad = bad_rows(local), bad_rows(reduced)
    loss_finite = loss[0].isfinite()
    tail = [
        _suspect(torch.where(local_bad.any(), local_bad, reduced_bad), local[:, SUM_SQUARES], loss_finite),
        micro_batch,
        reduced[:, SUM_SQUARES].sum(),
        reduced_bad.any().double(),
    ]
    return torch.cat([totals, loss, torch.stack(tail), host_fields])


def bad_rows(rows: Tensor) -> Tensor:
    """`[P]` bool: which parameters' gradients hold a NaN or an Inf."""
    return (rows[:, NUM_NAN] + rows[:, NUM_INF]) > 0


def _suspect(bad: Tensor, squares: Tensor, loss_finite: Tensor) -> Tensor:
    """Row of the parameter to blame if the step goes wrong; -1 if only the loss is bad.

    Under a finite loss the fault arose in the backward pass and spread towards the input: the last bad
    parameter of the forward pass is where it began. A non-finite loss poisons every gradient; then it is
    the first one. Where nothing is bad, it is the parameter with the largest gradient.
    """
    forward = torch.arange(1, len(bad) + 1, device=bad.device)
    last = (bad * forward).amax() - 1
    first = len(bad) - (bad * forward.flip(0)).amax()
    spread = torch.where(loss_finite, last, first)
    return torch.where(bad.any(), spread, torch.where(loss_finite, squares.argmax(), -1)).double()
