"""The default spike rule: robust z-scores of log gradient norm and loss against the run's recent past.

Legend: the first dimension of all state is the signal, `[log norm, loss]`; R recent samples; W residuals.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from harness.stability.rules.base import SpikeDetection, SpikeRule, shifted

__all__ = ["RobustRule"]

RECENT = 20
"""Samples that the expected value is the median of, and flagged ones in a row that make a new level."""

MAD_TO_SIGMA = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation (MAD)."""

FAR = 6.0
"""MAD spreads beyond which a residual counts as if it lay there."""

INCIDENT_RATIO = 30.0
"""Times its usual value from which a flagged norm is an incident by itself."""

INCIDENT_STEPS = 3
"""Steps that a disturbance lasts from which it is an incident."""

HIGH_LOSS = 3.5
"""Score of a loss that still counts as disturbed after a flagged step."""

LOG_NORM_FLOOR = 0.02
"""Least spread of the log norm: 2 % of the norm."""

LOSS_FLOOR = 0.004
"""Least spread of the loss, as a share of its highest level so far."""


class RobustRule(SpikeRule):
    """Flags a step whose log gradient norm or loss lies `threshold` spreads above what was to be expected.

    Expected is the median of the last 20 accepted samples. What a sample differs from that by is its
    residual. The spread is the standard deviation of the last `window` residuals about their median, in
    which none counts as further off than 6 scaled MADs, and never less than a share of the level: heavy
    tails widen it and single outliers do not. The score is the residual above the median residual, in
    spreads: a steady trend, which shifts all residuals alike, is no spike. On a falling trend the median
    residual counts as 0, so that the end of a fall is no spike either.

    The state takes in only trusted samples that were not flagged: neither a NaN nor a spike changes what
    later steps are measured by. So that a lasting change of level (new data, new batch size) is not flagged
    for ever, 20 flagged samples in a row that agree with one another, within the threshold, become the new
    recent past. Samples that do not agree, as in a divergence, go on being flagged; after `window` of them
    in a row the rule warms up afresh.

    A disturbance is a flagged step and those right after it that are flagged too or whose loss scores above
    3.5. Its third step is an incident, and so is each later one: odd data shows in one batch, a run that
    suffers in the next ones too. A flagged norm of at least 30 times what was expected is an incident by
    itself. All other flagged steps are outlier batches.

    The norm limit of a flagged step is the expected norm: clipped to it, the step weighs as much as a usual
    one. About 100 small kernels a step.

    Args:
        threshold: Score from which a step is flagged.
        window: Residuals looked back on.
        warmup: Residuals seen before anything is flagged.
    """

    def __init__(self, *, threshold: float = 7.0, window: int = 128, warmup: int = 64) -> None:
        super().__init__()
        self.threshold, self.window, self.warmup = threshold, window, warmup

    def _fresh_state(self, device: torch.device) -> dict[str, Tensor]:
        nothing = torch.full((2, self.window), torch.nan, dtype=torch.float64, device=device)
        return {
            "residuals": nothing,
            "recent": nothing.new_full((2, RECENT), torch.nan),
            "flagged_in_a_row": nothing.new_full((2, RECENT), torch.nan),
            "num_in_a_row": torch.zeros((), dtype=torch.int64, device=device),
            "num_disturbed": nothing.new_zeros(()),
            "peak_loss": nothing.new_zeros(()),
        }

    def detect(self, log_norm_t: Tensor, loss_t: Tensor, trusted_t: Tensor) -> SpikeDetection:
        state = self._on(log_norm_t.device)
        sample = torch.stack([log_norm_t.double(), loss_t.double()])
        usable = (sample.abs() < torch.inf) & trusted_t
        expected = _median(state["recent"], _num(state["recent"]))
        residual = sample - expected
        scores, spread = self._score(residual, expected)
        # NaN would be above no threshold, but it would stand in the record as a score.
        scores = torch.where(usable, scores, 0.0)
        stands_out = scores > self.threshold
        flagged = stands_out.any()
        num_disturbed = self._count_disturbed(flagged, scores[1])
        # The residual of a log norm is the log of a ratio.
        is_far = stands_out[0] & (residual[0] >= math.log(INCIDENT_RATIO))

        accepted = usable & ~flagged
        self._learn("recent", sample, accepted)
        self._learn("residuals", residual, accepted)
        self._follow_level(sample, spread, flagged, trusted_t)
        usual_norm = expected[0].exp()
        return SpikeDetection(
            flagged=flagged,
            is_incident=is_far | (num_disturbed >= INCIDENT_STEPS),
            scores=scores,
            usual=torch.stack([usual_norm, expected[1]]),
            norm_limit=torch.where(flagged, usual_norm, torch.inf),
            num_in_a_row=num_disturbed,
        )

    def _count_disturbed(self, flagged: Tensor, loss_score: Tensor) -> Tensor:
        """Steps in a row, this one included, of a disturbance, which begins with a flagged step."""
        before = self._state["num_disturbed"]
        # A high loss alone begins nothing: it continues what a flagged step began.
        disturbed = flagged | ((loss_score > HIGH_LOSS) & (before > 0))
        self._state["num_disturbed"] = (before + 1) * disturbed
        return self._state["num_disturbed"]

    def _score(self, residual: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
        """Score and spread per signal; the score is 0 while there is too little to go by."""
        residuals = self._state["residuals"]
        num = _num(residuals)
        usual = _median(residuals, num)
        deviations = (residuals - usual.unsqueeze(-1)).abs()
        mad = MAD_TO_SIGMA * _median(deviations, num)
        # Capped, not dropped: without the far ones a heavy tail would look narrow, and with them as they are
        # one outlier would widen the spread for `window` steps.
        near = torch.minimum(deviations, FAR * mad.unsqueeze(-1))
        # 0 / 0 before the first residual: NaN, which `num >= warmup` below keeps out of the score.
        sigma = (near.square().nansum(dim=-1) / num).sqrt()
        spread = torch.maximum(sigma, self._floor(expected[1].abs()))
        # On a falling trend the median residual is below 0; as 0 it makes no spike of the end of the fall.
        score = (residual - usual.clamp(min=0.0)) / spread
        return torch.where(num >= self.warmup, score, 0.0), spread

    def _floor(self, loss_level: Tensor) -> Tensor:
        """Least spread per signal. fmax: there is no level before the first sample."""
        peak = self._state["peak_loss"] = torch.fmax(self._state["peak_loss"], loss_level)
        return torch.stack([torch.full_like(peak, LOG_NORM_FLOOR), LOSS_FLOOR * peak])

    def _learn(self, name: str, values: Tensor, accepted: Tensor) -> None:
        """Adds each signal's value to the window `name` where it is accepted."""
        window = self._state[name]
        self._state[name] = torch.where(accepted.unsqueeze(-1), shifted(window, values), window)

    def _follow_level(self, sample: Tensor, spread: Tensor, flagged: Tensor, trusted: Tensor) -> None:
        """Takes flagged samples for the recent past once they have become the rule."""
        state = self._state
        self._learn("flagged_in_a_row", sample, flagged.expand(2))
        samples = state["flagged_in_a_row"]
        # A step that is not trusted neither counts nor ends the row; a trusted one, not flagged, ends it.
        num = torch.where(flagged, state["num_in_a_row"] + 1, state["num_in_a_row"] * ~trusted)
        disagree = (samples.amax(dim=-1) - samples.amin(dim=-1) > self.threshold * spread).any()
        # So many flagged steps that never agreed: the old level says nothing about this run any more.
        lost = num >= self.window
        new_level = lost | ((num >= RECENT) & ~disagree)
        state["recent"] = torch.where(new_level & (samples.abs() < torch.inf), samples, state["recent"])
        state["residuals"] = torch.where(lost, torch.nan, state["residuals"])
        state["num_in_a_row"] = num * ~new_level


def _num(window: Tensor) -> Tensor:
    """How many values of the last dimension are there; the others are NaN."""
    return (window == window).sum(dim=-1)


def _median(window: Tensor, num: Tensor) -> Tensor:
    """Median (the lower of two) of the `num` values of the last dimension that are there; NaN where none is.

    By sorting, which puts NaN last: torch's `nanmedian` along a dimension is not deterministic on CUDA.
    """
    middle = (num.unsqueeze(-1) - 1).div(2, rounding_mode="trunc").clamp(min=0)
    return window.sort(dim=-1).values.gather(-1, middle).squeeze(-1)
