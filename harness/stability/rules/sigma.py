"""The field's plain rule, for comparison: mean + 6 standard deviations of the last 128 steps."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.config.checks import require, require_positive
from harness.stability.rules.base import SpikeDetection, SpikeRule, no_limit, shifted

__all__ = ["SigmaRule"]


class SigmaRule(SpikeRule):
    """Flags a step whose gradient norm or loss is more than `threshold` standard deviations above its mean.

    As OLMo-core's skip-step optimizer had it at first, weaknesses included: the window takes every sample, so
    an outlier widens it (two equal spikes a few steps apart: the second is smaller in sigmas), and while a
    NaN is in it no comparison holds and every step is flagged, `window` of them. Not meant to act on.
    About 35 small kernels a step.

    Args:
        threshold: Standard deviations.
        window: Steps looked back on; the rule flags nothing before half of it is filled.
    """

    def __init__(self, *, threshold: float = 6.0, window: int = 128) -> None:
        super().__init__()
        self.threshold, self.window = threshold, window
        require_positive(self, "threshold")
        require(self, "window", window >= 2, "it has to be 2 or more")

    def _fresh_state(self, device: torch.device) -> dict[str, Tensor]:
        return {
            "samples": torch.zeros(2, self.window, dtype=torch.float64, device=device),
            "num_samples": torch.zeros((), dtype=torch.int64, device=device),
        }

    def detect(self, log_norm_t: Tensor, loss_t: Tensor, trusted_t: Tensor) -> SpikeDetection:
        state = self._on(log_norm_t.device)
        sample = torch.stack([log_norm_t.double().exp(), loss_t.double()])
        mean, sigma = self._mean_and_sigma()
        within = sample - mean <= self.threshold * sigma
        active = state["num_samples"] >= max(2, self.window // 2) - 1
        scores = torch.where(active, (sample - mean) / sigma, 0.0)
        state["samples"] = shifted(state["samples"], sample)
        state["num_samples"] = (state["num_samples"] + 1).clamp(max=self.window)
        flagged = ~within.all() & active & trusted_t
        return SpikeDetection(
            flagged=flagged,
            is_incident=flagged,
            scores=scores,
            usual=mean,
            norm_limit=no_limit(flagged),
            num_in_a_row=torch.zeros_like(mean[0]),
        )

    def _mean_and_sigma(self) -> tuple[Tensor, Tensor]:
        """Per signal, over the samples so far; the window is filled from its end."""
        samples, num = self._state["samples"], self._state["num_samples"]
        filled = torch.arange(self.window, device=samples.device) >= self.window - num
        mean = samples.sum(dim=-1) / num
        deviations = torch.where(filled, samples - mean.unsqueeze(-1), 0.0)
        return mean, (deviations.square().sum(dim=-1) / (num - 1)).sqrt()
