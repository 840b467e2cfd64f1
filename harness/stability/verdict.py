"""From what all ranks said to what every one of them does: on the device, from values equal everywhere.

Legend: W ranks = R replicas x S shards (plain: 1 x 1, DDP: W x 1, FSDP: 1 x W), float64 throughout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from harness.config import GuardConfig
from harness.records import Verdict
from harness.stability import lane
from harness.stability.layout import NUM_INF, NUM_NAN

__all__ = ["NUM_SUMMARY", "VERDICTS", "Decision", "Summary", "judge"]

VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
APPLY, CLIP, SKIP, STOP = range(4)

REPLICA_TOLERANCE = 1e-6
"""Relative difference between replicas' norms that the order of summation can explain."""


@dataclass(frozen=True, slots=True)
class Summary:
    """The decision in numbers, in the order in which they are packed for the host."""

    verdict: float
    """Index into VERDICTS."""
    loss: float
    grad_norm: float
    clip_coef: float
    divisor: float
    """What turns a measured gradient into the true one: loss scale x true tokens / nominal tokens."""
    loss_scale: float
    spike_score: float
    spike_flagged: float
    replicas_differ: float


NUM_SUMMARY = len(Summary.__slots__)


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of a step. All 0-d tensors on the device but `summary`, which is `[NUM_SUMMARY]`."""

    skip_t: Tensor
    """Bool: parameters and optimizer state stay as they are."""
    grad_scale_t: Tensor
    """fp32, at least as large as needed: gradients are to be divided by it."""
    overflowed_t: Tensor
    """Bool: a gradient that is not finite under a loss that is; what too large a loss scale does."""
    summary: Tensor


def judge(
    lanes: Tensor,
    *,
    num_replicas: int,
    config: GuardConfig,
    loss_scale_t: Tensor,
    nominal_tokens: float | None,
) -> Decision:
    """The decision on a step.

    Args:
        lanes: `[W, NUM_FIELDS]` as gathered; identical on all ranks, and so is what follows from it.
        nominal_tokens: What the loss was divided by before the backward pass; None: by its own tokens.
    """
    loss_sum, tokens = lanes[:, lane.LOSS_SUM].sum(), lanes[:, lane.TOKENS].sum()
    loss = loss_sum / tokens
    divisor = loss_scale_t.double()
    if nominal_tokens is not None:
        divisor = torch.where(tokens > 0, divisor * tokens / nominal_tokens, divisor)
    squares = lanes[:, lane.REDUCED_SUM_SQUARES].view(num_replicas, -1).sum(1)
    norm = squares.amax().sqrt() / divisor
    gradient_bad = lanes[:, [NUM_NAN, NUM_INF, lane.REDUCED_BAD, lane.UNREDUCED]].sum() > 0
    skip = gradient_bad | ~loss.isfinite()
    coefficient = _clip_coefficient(norm, config.max_norm)
    # A norm beyond fp32 would make the scale infinite, and dividing by that is no clipping.
    grad_scale = (divisor / coefficient).float()
    skip = skip | ~grad_scale.isfinite()
    verdict = torch.where(skip, STOP if config.nonfinite == "stop" else SKIP, (coefficient < 1).int())
    differ = squares.amax() - squares.amin() > REPLICA_TOLERANCE * squares.amax()
    nothing = torch.zeros_like(norm)
    summary = [verdict, loss, norm, torch.where(skip, 1.0, coefficient), divisor, loss_scale_t]
    summary += [nothing, nothing, differ]
    return Decision(
        skip_t=skip,
        grad_scale_t=torch.where(skip, 1.0, grad_scale),
        overflowed_t=gradient_bad & loss.isfinite(),
        summary=torch.stack([value.double() for value in summary]),
    )


def _clip_coefficient(norm: Tensor, max_norm: float | None) -> Tensor:
    return torch.ones_like(norm) if max_norm is None else (max_norm / norm).clamp(max=1.0)
