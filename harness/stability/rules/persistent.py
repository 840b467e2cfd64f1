"""Not a spike but a run that has left its course: a loss that stays high."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.config.checks import require_positive
from harness.stability.rules.base import SpikeDetection, SpikeRule, no_limit, shifted

__all__ = ["PersistentRule"]


class PersistentRule(SpikeRule):
    """Flags a loss that has doubled for good and a run that has diverged (LLM Foundry's `KillLossSpike`).

    A rise: the loss is at least `factor` times the mean of the last `window` losses, for the `in_a_row`-th
    step in a row or longer. A divergence: after two windows, at least half of the last window lies above
    `loss_cap` or above all losses of the first window, whichever is lower. A single spike is neither.

    Unlike the original it takes no loss that is not finite: there, a NaN in the window ends all detection.
    The score is the loss as a multiple of the window's mean. About 45 small kernels a step.

    Args:
        factor: Of the mean, from which a loss is an outlier.
        in_a_row: Outliers that make a rise.
        window: Losses looked back on; LLM Foundry takes 5 % of the run's steps and at least 100.
        loss_cap: What counts as diverged for certain; 10 is worse than guessing in most vocabularies.
    """

    def __init__(
        self, *, factor: float = 2.0, in_a_row: int = 5, window: int = 100, loss_cap: float = 10.0
    ) -> None:
        super().__init__()
        self.factor, self.in_a_row, self.window, self.loss_cap = factor, in_a_row, window, loss_cap
        require_positive(self, "factor", "in_a_row", "window", "loss_cap")

    def _fresh_state(self, device: torch.device) -> dict[str, Tensor]:
        zero = torch.zeros((), dtype=torch.int64, device=device)
        return {
            "losses": torch.zeros(self.window, dtype=torch.float64, device=device),
            "cap": torch.full((), -torch.inf, dtype=torch.float64, device=device),
            "num_losses": zero,
            "num_in_a_row": zero.clone(),
        }

    def detect(self, log_norm_t: Tensor, loss_t: Tensor, trusted_t: Tensor) -> SpikeDetection:
        state = self._on(loss_t.device)
        loss = loss_t.double()
        usable = trusted_t & (loss.abs() < torch.inf)
        mean, full = state["losses"].mean(), state["num_losses"] >= self.window
        outlier = usable & full & (mean > 0) & (loss >= self.factor * mean)
        risen = self._risen(outlier, usable)
        self._learn(loss, usable)
        score = torch.where(usable & full & (mean > 0), loss / mean, 0.0)
        flagged = usable & (risen | self._diverged())
        return SpikeDetection(
            flagged=flagged,
            is_incident=flagged,
            scores=torch.stack([torch.zeros_like(score), score]),
            usual=torch.stack([torch.full_like(mean, torch.nan), mean]),
            norm_limit=no_limit(score),
            num_in_a_row=torch.zeros_like(score),
        )

    def _risen(self, outlier: Tensor, usable: Tensor) -> Tensor:
        state = self._state
        in_a_row = torch.where(outlier, state["num_in_a_row"] + 1, state["num_in_a_row"] * ~usable)
        state["num_in_a_row"] = in_a_row
        return in_a_row >= self.in_a_row

    def _diverged(self) -> Tensor:
        state = self._state
        num_high = (state["losses"] > state["cap"].clamp(max=self.loss_cap)).sum()
        return (state["num_losses"] > 2 * self.window) & (2 * num_high >= self.window)

    def _learn(self, loss: Tensor, usable: Tensor) -> None:
        state = self._state
        state["losses"] = torch.where(usable, shifted(state["losses"], loss), state["losses"])
        in_first_window = usable & (state["num_losses"] < self.window)
        state["cap"] = torch.where(in_first_window, torch.maximum(state["cap"], loss), state["cap"])
        state["num_losses"] = state["num_losses"] + usable
