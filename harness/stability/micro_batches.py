"""What the micro-batches of a step add up to, and which of them is to blame if the step goes wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.stability.lane import bad_rows
from harness.stability.layout import SUM_SQUARES

__all__ = ["MicroBatches"]


class MicroBatches:
    """Sums up losses and tokens; suspects the first micro-batch that left anything non-finite, else the one
    that changed the size of the accumulated gradient most. All on the device, without synchronising."""

    def __init__(self, device: torch.device) -> None:
        self.num = 0
        self.loss_t = torch.zeros(3, dtype=torch.float64, device=device)
        """Sum of the loss, number of tokens, and how many of them were predicted right."""
        self.suspect_t = torch.zeros((), dtype=torch.float64, device=device)
        self._squares_t = torch.zeros_like(self.suspect_t)
        self._largest_change_t = torch.zeros_like(self.suspect_t)

    def add(self, loss_sum: Tensor, num_tokens: Tensor | float, num_correct: Tensor | float) -> None:
        """Counts one more micro-batch."""
        self.loss_t[0] += loss_sum.detach().double()
        self.loss_t[1] += num_tokens
        self.loss_t[2] += num_correct
        self.num += 1

    def look(self, rows: Tensor) -> None:
        """Takes `[P, 5]` of the gradient as the latest micro-batch left it; twice the same does no harm."""
        squares = rows[:, SUM_SQUARES].sum()
        bad = bad_rows(rows).any() | ~self.loss_t[0].isfinite()
        change = torch.where(bad, torch.inf, (squares - self._squares_t).abs())
        worse = change > self._largest_change_t
        self.suspect_t.masked_fill_(worse, self.num - 1)
        torch.maximum(change, self._largest_change_t, out=self._largest_change_t)
        self._squares_t.copy_(squares)

    def clear(self) -> None:
        """Begins the next step."""
        self.num = 0
        for tensor in (self.loss_t, self.suspect_t, self._squares_t, self._largest_change_t):
            tensor.zero_()
