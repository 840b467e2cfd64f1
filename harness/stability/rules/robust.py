"""The default spike rule: robust z-scores of log gradient norm and loss against the run's recent past.

Legend: the first dimension of all memory is the signal, `[log norm, loss]`; R recent samples; W residuals.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.stability.rules.base import SpikeRule, SpikeVerdict, shifted

__all__ = ["RobustRule"]

RECENT = 16
"""Samples that the expected value is the median of, and flagged ones in a row that make a new level."""

MAD_TO_SIGMA = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""

LOG_NORM_FLOOR = 0.05
"""Least spread of the log norm: 5 % of the norm."""

LOSS_FLOOR = 0.01
"""Least spread of the loss, as a share of its level ..."""

LEAST_LOSS_FLOOR = 1e-6
"""... and for a loss whose level is 0."""


class RobustRule(SpikeRule):
    """Flags a step whose log gradient norm or loss lies `threshold` spreads above what was to be expected.

    Expected is the median of the last 16 accepted samples. What a sample differs from that by is its
    residual; the last `window` residuals have a median and a spread (median absolute deviation, scaled to a
    standard deviation, with a floor relative to the level). The score is the residual above the median
    residual, in spreads. So a steady trend is no spike: it moves the expectation and shifts all residuals
    alike. On a falling trend the median residual counts as 0, so that the end of a fall is no spike either.

    The memory takes only trusted samples that were not flagged: neither a NaN nor a spike changes what later
    steps are measured by. So that a lasting change of level (new data, new batch size) is not flagged for
    ever, 16 flagged samples in a row that agree with one another, within the threshold, become the new
    recent past; samples that do not agree, as in a divergence, go on being flagged, at most `window` steps.

    The norm limit of a flagged step is the expected norm: clipped to it, the step weighs as much as a usual
    one. 45 small kernels a step.

    Args:
        threshold: Score from which a step is flagged.
        window: Residuals looked back on.
        warmup: Residuals seen before anything is flagged.
    """

    def __init__(self, *, threshold: float = 6.0, window: int = 128, warmup: int = 64) -> None:
        super().__init__()
        self.threshold, self.window, self.warmup = threshold, window, warmup

    def _fresh_state(self, device: torch.device) -> dict[str, Tensor]:
        nothing = torch.full((2, self.window), torch.nan, dtype=torch.float64, device=device)
        return {
            "residuals": nothing,
            "recent": nothing.new_full((2, RECENT), torch.nan),
            "flagged_in_a_row": nothing.new_full((2, RECENT), torch.nan),
            "num_in_a_row": torch.zeros((), dtype=torch.int64, device=device),
        }

    def judge(self, log_norm_t: Tensor, loss_t: Tensor, trusted_t: Tensor) -> SpikeVerdict:
        memory = self._on(log_norm_t.device)
        sample = torch.stack([log_norm_t.double(), loss_t.double()])
        usable = (sample.abs() < torch.inf) & trusted_t
        expected = _median(memory["recent"])
        score, spread = self._score(sample - expected, expected)
        score = torch.where(usable, score, 0.0)
        flagged = (score > self.threshold).any()

        accepted = usable & ~flagged
        self._learn("recent", sample, accepted)
        self._learn("residuals", sample - expected, accepted)
        self._follow_level(sample, spread, flagged, trusted_t)
        return SpikeVerdict(flagged, score.max(), torch.where(flagged, expected[0].exp(), torch.inf))

    def _score(self, residual: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
        """Score and spread per signal; the score is 0 while there is too little to go by."""
        residuals = self._state["residuals"]
        usual = _median(residuals)
        spread = MAD_TO_SIGMA * _median((residuals - usual.unsqueeze(-1)).abs())
        loss_floor = expected[1].abs() * LOSS_FLOOR + LEAST_LOSS_FLOOR
        floor = torch.stack([torch.full_like(loss_floor, LOG_NORM_FLOOR), loss_floor])
        spread = torch.maximum(spread, floor)
        active = (residuals == residuals).sum(dim=-1) >= self.warmup
        return torch.where(active, (residual - usual.clamp(min=0.0)) / spread, 0.0), spread

    def _learn(self, name: str, values: Tensor, accepted: Tensor) -> None:
        """Adds each signal's value to the window `name` where it is accepted."""
        window = self._state[name]
        self._state[name] = torch.where(accepted.unsqueeze(-1), shifted(window, values), window)

    def _follow_level(self, sample: Tensor, spread: Tensor, flagged: Tensor, trusted: Tensor) -> None:
        """Takes flagged samples for the recent past once they have become the rule."""
        memory = self._state
        self._learn("flagged_in_a_row", sample, flagged.expand(2))
        samples = memory["flagged_in_a_row"]
        num = torch.where(flagged, memory["num_in_a_row"] + 1, memory["num_in_a_row"] * ~trusted)
        disagree = (samples.amax(dim=-1) - samples.amin(dim=-1) > self.threshold * spread).any()
        new_level = (num >= RECENT) & (~disagree | (num >= self.window))
        memory["recent"] = torch.where(new_level & (samples.abs() < torch.inf), samples, memory["recent"])
        memory["num_in_a_row"] = num * ~new_level


def _median(window: Tensor) -> Tensor:
    """Median over the last dimension of what is there; NaN where nothing is."""
    return window.nanmedian(dim=-1).values
