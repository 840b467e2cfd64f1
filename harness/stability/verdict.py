"""From what all ranks said to what every one of them does: on the device, from values equal everywhere.

Legend: W ranks = R replicas x S shards (plain: 1 x 1, DDP: W x 1, FSDP: 1 x W), float64 throughout.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import get_args

import torch
from torch import Tensor

from harness.config import GuardConfig
from harness.records import Verdict
from harness.stability import lane
from harness.stability.detectors import SpikeRule, make_rule
from harness.stability.layout import NUM_INF, NUM_NAN

__all__ = ["VERDICTS", "Decision", "Judge", "Summary"]

VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
APPLY, CLIP, SKIP, STOP = range(4)

REPLICA_TOLERANCE = 1e-6
"""Relative difference between replicas' sums of squares that the order of summation can explain."""


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
    is_spike: float
    norms_differ: float


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of a step: 0-d tensors on the device."""

    skip_t: Tensor
    """Bool: parameters and optimizer state stay as they are."""
    found_inf_t: Tensor
    """fp32: the same as 0 or 1, as fused optimizers read it."""
    grad_scale_t: Tensor
    """fp32: gradients are to be divided by it."""
    overflowed_t: Tensor
    """Bool: a gradient that is not finite under a loss that is; what too large a loss scale does."""
    summary: Tensor
    """`[9]` float64, a `Summary`."""


class Judge:
    """Decides on steps, one after the other; remembers only what its spike rule remembers.

    Raises:
        ConfigError: there is no such spike rule.
    """

    def __init__(self, config: GuardConfig, *, num_replicas: int) -> None:
        self._config = config
        self._num_replicas = num_replicas
        self.rule: SpikeRule | None = None if config.spike == "off" else _rule(config)

    def memory(self) -> dict[str, Tensor]:
        """The spike rule's memory, live; empty without a rule."""
        return {} if self.rule is None else self.rule.memory

    def judge(self, lanes: Tensor, *, loss_scale_t: Tensor, nominal_tokens_t: Tensor) -> Decision:
        """The decision on a step. Does not synchronise.

        Args:
            lanes: `[W, NUM_FIELDS]` as gathered; identical on all ranks, and so is what follows from it.
            nominal_tokens_t: 0-d, what the loss was divided by before the backward pass; 0: its own tokens.
        """
        tokens = lanes[:, lane.TOKENS].sum()
        loss = lanes[:, lane.LOSS_SUM].sum() / tokens
        divisor = loss_scale_t.double()
        is_nominal = (tokens > 0) & (nominal_tokens_t > 0)
        divisor = torch.where(is_nominal, divisor * tokens / nominal_tokens_t, divisor)
        squares = lanes[:, lane.REDUCED_SUM_SQUARES].view(self._num_replicas, -1).sum(1)
        norm = squares.amax().sqrt() / divisor
        gradient_bad = _num_bad(lanes) > 0
        bad = gradient_bad | ~loss.isfinite()
        score, is_spike, limit = self._consult_rule(norm, loss, ~bad)
        coefficient = (limit / norm).clamp(max=1.0)
        # The optimizer takes the scale in fp32; a norm too far beyond that cannot be clipped.
        bad = bad | ~(divisor / coefficient).float().isfinite()
        overflowed = gradient_bad & loss.isfinite()
        # An overflow that a smaller loss scale may cure is no reason to end a run.
        fatal = bad & ~(overflowed & (loss_scale_t > 1))
        verdict = self._verdict(bad, fatal, is_spike, coefficient)
        skip = verdict >= SKIP
        coefficient = torch.where(skip, 1.0, coefficient)
        summary = {
            "verdict": verdict,
            "loss": loss,
            "grad_norm": norm,
            "clip_coef": coefficient,
            "divisor": divisor,
            "loss_scale": loss_scale_t,
            "spike_score": score,
            "is_spike": is_spike,
            "norms_differ": self._norms_differ(squares),
        }
        return Decision(
            skip_t=skip,
            found_inf_t=skip.float(),
            grad_scale_t=(divisor / coefficient).float(),
            overflowed_t=overflowed,
            summary=torch.stack([summary[field.name].double() for field in fields(Summary)]),
        )

    def _verdict(self, bad: Tensor, fatal: Tensor, is_spike: Tensor, coefficient: Tensor) -> Tensor:
        """Index into VERDICTS."""
        verdict = (coefficient < 1).long()
        if self._config.spike == "skip":
            verdict = torch.where(is_spike, SKIP, verdict)
        verdict = torch.where(bad, SKIP, verdict)
        return torch.where(fatal, STOP, verdict) if self._config.nonfinite == "stop" else verdict

    def _consult_rule(self, norm: Tensor, loss: Tensor, trusted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Score, whether the step is a spike, and the norm to clip to."""
        limit = torch.full_like(norm, torch.inf if self._config.max_norm is None else self._config.max_norm)
        if self.rule is None:
            return torch.zeros_like(norm), torch.zeros_like(trusted), limit
        opinion = self.rule.judge(norm.log(), loss, trusted)
        if self._config.spike == "clip":
            limit = torch.minimum(limit, opinion.norm_limit)
        return opinion.score, opinion.flagged, limit

    def _norms_differ(self, squares: Tensor) -> Tensor:
        if self._config.replicas == "off":
            return torch.zeros_like(squares[0])
        return squares.amax() - squares.amin() > REPLICA_TOLERANCE * squares.amax()


def _num_bad(lanes: Tensor) -> Tensor:
    bad = lanes[:, NUM_NAN] + lanes[:, NUM_INF] + lanes[:, lane.REDUCED_BAD] + lanes[:, lane.FAULTS]
    return bad.sum()


def _rule(config: GuardConfig) -> SpikeRule:
    if config.spike_rule != "robust":
        return make_rule(config.spike_rule)
    return make_rule(
        "robust",
        threshold=config.spike_threshold,
        window=config.spike_window,
        warmup=config.spike_warmup,
    )
