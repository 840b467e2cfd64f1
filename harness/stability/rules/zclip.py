"""ZClip: clip to a norm that follows the run instead of a fixed one."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.config.checks import require, require_positive
from harness.stability.rules.base import SpikeDetection, SpikeRule

__all__ = ["ZClipRule"]


class ZClipRule(SpikeRule):
    """Adaptive clipping by the z-score of the gradient norm (Kumar et al., arXiv 2504.02507).

    Mean and variance of the norm are exponential moving averages, started from the first `warmup` norms. A
    norm with z = (norm - mean) / sigma above `threshold` is limited to mean + threshold^2 / z x sigma, and
    enters the averages as limited. As a detector it is eager: of normally distributed norms 0.6 % are
    flagged, which costs little when all that follows is a milder clip. So every flagged step is an outlier
    batch and none an incident. The loss is not looked at.

    Unlike the published code it takes no step that is not trusted: there, one NaN ends all clipping.
    About 40 small kernels a step.

    Args:
        threshold: z-score from which a norm is limited.
        decay: Of the moving averages.
        warmup: Norms that the averages are started from.
    """

    def __init__(self, *, threshold: float = 2.5, decay: float = 0.97, warmup: int = 25) -> None:
        super().__init__()
        self.threshold, self.decay, self.warmup = threshold, decay, warmup
        require_positive(self, "threshold", "warmup")
        require(self, "decay", 0 < decay < 1, "it lies between 0 and 1")

    def _fresh_state(self, device: torch.device) -> dict[str, Tensor]:
        zero = torch.zeros((), dtype=torch.float64, device=device)
        return {"mean": zero, "variance": zero.clone(), "num_samples": zero.clone()}

    def detect(self, log_norm_t: Tensor, loss_t: Tensor, trusted_t: Tensor) -> SpikeDetection:
        state = self._on(log_norm_t.device)
        norm = log_norm_t.double().exp()
        usable = trusted_t & (norm < torch.inf)
        sigma = state["variance"].sqrt()
        active = usable & (state["num_samples"] >= self.warmup) & (sigma > 0)
        score = torch.where(active, (norm - state["mean"]) / sigma, 0.0)
        flagged = score > self.threshold
        mean, nothing = state["mean"], torch.zeros_like(score)
        limit = torch.where(flagged, mean + self.threshold**2 / score * sigma, torch.inf)
        self._learn(torch.minimum(norm, limit), usable)
        return SpikeDetection(
            flagged=flagged,
            is_incident=torch.zeros_like(flagged),
            scores=torch.stack([score, nothing]),
            usual=torch.stack([mean, torch.full_like(mean, torch.nan)]),
            norm_limit=limit,
            num_in_a_row=nothing,
        )

    def _learn(self, norm: Tensor, usable: Tensor) -> None:
        """Plain mean and variance of the first `warmup` norms, moving averages from there on."""
        state = self._state
        num = state["num_samples"] + 1
        warming = num <= self.warmup
        rate = torch.where(warming, 1 / num, 1 - self.decay)
        mean = torch.lerp(state["mean"], norm, rate)
        # While warming up this is Welford's update; afterwards the published one, from the new mean alone.
        other = torch.where(warming, state["mean"], mean)
        variance = torch.lerp(state["variance"], (norm - other) * (norm - mean), rate)
        state["mean"] = torch.where(usable, mean, state["mean"])
        state["variance"] = torch.where(usable, variance, state["variance"])
        state["num_samples"] = state["num_samples"] + usable
