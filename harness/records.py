"""The values in which the peers meet: what a step was, what happened, in which state a run is.

`stability` makes `StepRecord`s, `training` hands them on, `tracking` writes them down; none of the three
imports another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["ParameterRow", "RankRow", "StepRecord", "Verdict"]

Verdict = Literal["apply", "clip", "skip", "stop"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterRow:
    """Statistics of one parameter's gradient. Norms and extremes are over the finite elements."""

    grad_norm: float
    max_abs: float
    num_nan: int
    num_inf: int
    num_zero: int
    num_elements: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRow:
    """What one rank said of its own share of a step, before any reduction."""

    rank: int
    loss: float
    """Mean over the rank's tokens."""
    num_tokens: int
    grad_norm: float
    """L2 norm of the rank's own gradient, over finite elements."""
    max_abs: float
    num_nan: int
    num_inf: int
    num_zero: int
    compute_s: float = 0.0
    """Seconds in forward and backward, without waiting for other ranks where that can be told apart."""
    data_wait_s: float = 0.0
    stop_requested: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """What the guard measured in one step and what it did about it. Equal on all ranks."""

    step: int
    verdict: Verdict
    reason: str | None = None
    """Why the verdict is not a plain `apply`, in words; also the warning of a rule that only warns."""
    loss: float
    """Mean over all tokens of the global batch; as measured, so NaN stays NaN."""
    grad_norm: float
    """Norm of the reduced gradient before clipping, over finite elements."""
    clip_coef: float = 1.0
    """What the gradient was multiplied by: min(1, max_norm / grad_norm); 1.0 if nothing was clipped."""
    num_tokens: int = 0
    num_nan: int = 0
    """NaN gradient elements over all ranks, before the reduction."""
    num_inf: int = 0
    num_zero: int = 0
    max_abs: float = 0.0
    loss_scale: float = 1.0
    rank: int | None = None
    """The culprit: the lowest rank whose own loss or gradient was not finite."""
    parameter: str | None = None
    """The culprit's first parameter, in the order of the forward pass, with a non-finite gradient."""
    micro_batch: int | None = None
    per_rank: tuple[RankRow, ...] = ()
    per_parameter: Mapping[str, ParameterRow] = field(default_factory=dict)
    """Statistics of the gradient before the reduction, by parameter name; only when asked for."""

    @property
    def skipped(self) -> bool:
        """Whether the step left parameters and optimizer state untouched."""
        return self.verdict in ("skip", "stop")
