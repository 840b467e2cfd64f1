"""The values in which the peers meet: what a step was, what happened, in which state a run is.

`stability` makes `StepRecord`s, `training` hands them on, `tracking` writes them down; none of the three
imports another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Culprit", "Finding", "ParameterRow", "ParameterSample", "RankRow", "StepRecord", "Verdict"]

Verdict = Literal["apply", "clip", "skip", "stop"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterRow:
    """Statistics of one parameter's gradient. Norms and extremes are over the finite elements."""

    grad_norm: float
    """L2 norm of the reduced gradient; the other values are of all ranks' own ones, before the reduction."""
    max_abs: float
    """NaN, like -1 of `num_zero`: not measured in this step."""
    num_nan: int
    num_inf: int
    num_zero: int
    num_elements: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterSample:
    """What a step did to one parameter, taken every so many steps and told with the next step's record. Of a
    skipped step the update is 0."""

    weight_norm: float
    """L2 norm after the step."""
    update_norm: float
    """L2 norm of the step's change, estimated from evenly spaced elements."""
    update_ratio: float | None
    """update_norm / weight_norm; about 1e-3 is healthy. None for a parameter of zeros."""
    second_moment_min: float | None
    """Extremes of Adam's second moment; None for other optimizers, and before the first update."""
    second_moment_max: float | None
    underflow_frac: float
    """Estimated share of gradient elements that are not 0, yet below the least normal number of the compute
    precision."""


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
    num_saves: int = 0
    """Saves of checkpoints that the rank knew to have ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Culprit:
    """A rank whose share of a step went wrong."""

    rank: int
    micro_batch: int | None
    """The first that left something bad; of a spike the one that changed the gradient most. None: the loop
    does not tell the guard of micro-batches."""
    samples: tuple[int, ...] = ()
    """Indices of the micro-batch's samples in the data set, where the loop tells."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a check for silent errors has found: what is wrong with the loop, and not with a step of it."""

    check: str
    """Name of the check."""
    problem: str
    """What is wrong, in words, with ranks and names."""
    remedy: str
    rank: int | None = None
    """The one rank that it concerns; None: all, or several."""
    parameter: str | None = None

    def summary(self) -> str:
        """One line: `cleared: gradients were not cleared between steps; call zero_grad() ...`."""
        return f"{self.check}: {self.problem}; {self.remedy}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """What the guard measured in one step and what it did about it. Equal on all ranks."""

    step: int
    verdict: Verdict
    reason: str | None = None
    """What is wrong with the step, in words: why it was skipped, or the warning of a rule that only warns. A
    step with a reason is an incident; a gradient clipped to the maximum of every step needs none."""
    note: str | None = None
    """What is unusual about a step that is in order otherwise, in words: an outlier batch. No incident."""
    loss: float
    """Mean over all tokens of the global batch; as measured, so NaN stays NaN."""
    grad_norm: float
    """Norm of the reduced gradient before clipping, over finite elements."""
    clip_coef: float = 1.0
    """What the gradient was multiplied by: min(1, max_norm / grad_norm); 1.0 if nothing was clipped."""
    num_tokens: int = 0
    num_correct: int = 0
    """How many of the tokens were predicted right, where the loop tells."""
    num_nan: int = 0
    """NaN gradient elements over all ranks, before the reduction."""
    num_inf: int = 0
    num_zero: int = 0
    max_abs: float = 0.0
    loss_scale: float = 1.0
    rank: int | None = None
    """The culprit: the rank whose own loss or gradient was not finite first (in the earliest micro-batch, the
    lowest of several); or the one whose replica differs from the others."""
    parameter: str | None = None
    """Where the culprit's non-finite gradient began: the last such parameter of the forward pass under a
    finite loss, for a fault of the backward pass spreads towards the input; the first under a loss that is
    not finite, which poisons them all."""
    micro_batch: int | None = None
    """The culprit's; None where there is none, or the loop does not tell the guard of micro-batches."""
    culprits: tuple[Culprit, ...] = ()
    """All ranks whose own loss or gradient was not finite, by micro-batch and rank, so that the first is
    `rank`; or the one rank that stands out in a spike."""
    per_rank: Sequence[RankRow] = ()
    per_parameter: Mapping[str, ParameterRow] = field(default_factory=dict)
    """Statistics of the gradient by parameter name; every so many steps, and of every skipped step."""
    culprit_parameters: Mapping[str, ParameterRow] = field(default_factory=dict)
    """The culprit's own gradient before the reduction, by parameter name; where there is one and
    `per_parameter` was measured."""
    sampled: Mapping[str, ParameterSample] = field(default_factory=dict)
    """What the step before did to the weights, by parameter name; every so many steps."""
    measured: Mapping[str, float] = field(default_factory=dict)
    """What checks of a user's own found, by the names that log and mirrors show; every so many steps."""
    findings: tuple[Finding, ...] = ()
    """What checks for silent errors have found by this step, each said once in a run."""
    attention_logit_max: tuple[float, ...] = ()
    """Largest attention logit per layer over all ranks; every so many steps, where the loop lets the guard
    look. Beyond about 100 a model is about to diverge."""
    spike_score: float = 0.0
    """How unusual loss and norm were, in the spike rule's own unit; 0 while it warms up or without one."""
    is_spike: bool = False
    """The size of loss or gradient norm is an incident, whatever was done about it."""
    is_outlier: bool = False
    """Loss or gradient norm is out of the ordinary, in an outlier batch that is no incident."""
    is_absurd: bool = False
    """The gradient norm is so large that it cannot be meant, so the step was skipped; a spike as well."""
    clipped_by_spike: bool = False
    """The gradient was clipped to what the spike rule allows, and not to the maximum of every step."""
    undone: bool = False
    """The update left weights or moments that were not finite, and was taken back; a skipped step as well."""
    replicas_differ: bool = False
    """Reduced gradients, parameters or optimizer state were not the same on all replicas."""

    @property
    def skipped(self) -> bool:
        """Whether the step left parameters and optimizer state untouched."""
        return self.verdict in ("skip", "stop")
