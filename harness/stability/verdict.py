"""From what all ranks said to what every one of them does: on the device, from values equal everywhere.

Legend: W ranks = R replicas x S shards (plain: 1 x 1, DDP: W x 1, FSDP: 1 x W), float64 throughout.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import get_args

import torch
from torch import Tensor

from harness.config import GuardConfig
from harness.records import Verdict
from harness.stability.layout import NUM_INF, NUM_NAN
from harness.stability.rank_statistics import FAULTS, LOSS_SUM, REDUCED_BAD, REDUCED_SUM_SQUARES, TOKENS
from harness.stability.size import SizeCheck, SizeFinding

__all__ = ["VERDICTS", "Decider", "Decision", "Summary"]

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
    norm_score: float
    loss_score: float
    usual_norm: float
    usual_loss: float
    is_spike: float
    is_outlier: float
    is_absurd: float
    clipped_by_spike: float
    num_in_a_row: float
    norms_differ: float


SIZES = [f.name for f in fields(SizeFinding) if f.name in {g.name for g in fields(Summary)}]
"""What `Summary` takes over from a `SizeFinding`."""


_VERDICT, _CLIP_COEF = ([f.name for f in fields(Summary)].index(name) for name in ("verdict", "clip_coef"))


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
    """`[n]` float64, a `Summary`."""

    def taken_back(self, bad_t: Tensor, *, stops: bool) -> Decision:
        """That of a step whose update is taken back if `bad_t` (0-d bool); then the run ends if `stops`."""
        is_news = bad_t & ~self.skip_t
        summary = self.summary.clone()
        summary[_VERDICT] = torch.where(is_news, STOP if stops else SKIP, summary[_VERDICT])
        summary[_CLIP_COEF] = torch.where(is_news, 1.0, summary[_CLIP_COEF])
        skip = self.skip_t | bad_t
        return replace(self, skip_t=skip, found_inf_t=skip.float(), summary=summary)

    @property
    def is_on_host(self) -> bool:
        """Whether it can be read for nothing: on the CPU. From a device it would have to be waited for."""
        return self.skip_t.device.type == "cpu"


class Decider:
    """Decides on steps, one after the other; has no state but that of `size`.

    Raises:
        ConfigError: there is no such spike rule.
    """

    def __init__(self, config: GuardConfig, *, num_replicas: int) -> None:
        self._config = config
        self._num_replicas = num_replicas
        self.size = SizeCheck(config)

    def decide(
        self, per_rank: Tensor, *, loss_scale_t: Tensor, is_unscaled_t: Tensor, nominal_tokens_t: Tensor
    ) -> Decision:
        """The decision on a step. Does not synchronise.

        Args:
            per_rank: `[W, NUM_FIELDS]` rank statistics as gathered; identical on all ranks, and so is what
                follows from it.
            is_unscaled_t: 0-d bool, the gradients have been divided by the loss scale already.
            nominal_tokens_t: 0-d, what the loss was divided by before the backward pass; 0: its own tokens.
        """
        tokens = per_rank[:, TOKENS].sum()
        loss = per_rank[:, LOSS_SUM].sum() / tokens
        # Ranks divide their summed losses by a constant, because the true number of tokens is known only now.
        # Divided by this, the gradient is that of the mean over all tokens, without the loss scale.
        divisor = torch.where(is_unscaled_t, 1.0, loss_scale_t.double())
        is_nominal = (tokens > 0) & (nominal_tokens_t > 0)
        divisor = torch.where(is_nominal, divisor * tokens / nominal_tokens_t, divisor)
        # Shards add up to a replica; replicas hold the same gradient, so theirs are not added.
        squares = per_rank[:, REDUCED_SUM_SQUARES].view(self._num_replicas, -1).sum(1)
        # Replicas should be equal; where they are not, the largest counts, on all ranks alike.
        norm = squares.amax().sqrt() / divisor
        gradient_bad = _num_bad(per_rank) > 0
        bad = gradient_bad | ~loss.isfinite() | (per_rank[:, FAULTS].sum() > 0)
        # Taken whatever the step is like: branching on `bad` would be a read on the host.
        size = self.size.check(norm, loss, ~bad)
        coefficient = (size.limit / norm).clamp(max=1.0)
        # The optimizer takes the scale in fp32; a norm too far beyond that cannot be clipped.
        bad = bad | ~(divisor / coefficient).float().isfinite()
        # Under a finite loss it was the backward pass or the reduction that overflowed. A loss that is not
        # finite was so before it was scaled, and a smaller scale would not help.
        overflowed = gradient_bad & loss.isfinite()
        # An overflow that a smaller loss scale may cure is no reason to end a run.
        fatal = bad & ~(overflowed & (loss_scale_t > 1))
        verdict = self._verdict(bad, fatal, size.skip, coefficient)
        # STOP too leaves the step out: the run ends when the record is read, some steps later.
        skip = verdict >= SKIP
        # In a step that is left out nothing is clipped; its norm may be NaN, which is not for `grad_scale_t`.
        coefficient = torch.where(skip, 1.0, coefficient)
        summary = {
            **{name: getattr(size, name) for name in SIZES},
            "verdict": verdict,
            "loss": loss,
            "grad_norm": norm,
            "clip_coef": coefficient,
            "divisor": divisor,
            "loss_scale": loss_scale_t,
            "norms_differ": self._norms_differ(squares),
        }
        return Decision(
            skip_t=skip,
            found_inf_t=skip.float(),
            grad_scale_t=(divisor / coefficient).float(),
            overflowed_t=overflowed,
            summary=torch.stack([summary[field.name].double() for field in fields(Summary)]),
        )

    def _verdict(self, bad: Tensor, fatal: Tensor, skip: Tensor, coefficient: Tensor) -> Tensor:
        """Index into VERDICTS."""
        verdict = torch.where(bad | skip, SKIP, (coefficient < 1).long())
        return torch.where(fatal, STOP, verdict) if self._config.nonfinite == "stop" else verdict

    def _norms_differ(self, squares: Tensor) -> Tensor:
        if self._config.replicas == "off":
            return torch.zeros_like(squares[0])
        return squares.amax() - squares.amin() > REPLICA_TOLERANCE * squares.amax()


def _num_bad(per_rank: Tensor) -> Tensor:
    return (per_rank[:, NUM_NAN] + per_rank[:, NUM_INF] + per_rank[:, REDUCED_BAD]).sum()
