"""What the micro-batches of a step add up to, and which of them is to blame if the step goes wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.errors import ConfigError
from harness.stability.layout import SUM_SQUARES
from harness.stability.loss import checked_count, checked_loss
from harness.stability.rank_statistics import bad_rows

__all__ = ["MicroBatches"]


class MicroBatches:
    """Sums up losses and tokens; suspects the first micro-batch that left anything non-finite, else the one
    that changed the size of the accumulated gradient most. Without synchronising: what is known on the device
    is summed up there, and what the host knows on the host. Tensors keep their places from step to step."""

    def __init__(self, device: torch.device) -> None:
        self.num = 0
        self.counts_tokens = False
        """Whether the caller counts tokens, and not means."""
        self._is_whole_step = False
        self._num_tokens, self._num_correct = 0.0, 0.0
        self.loss_t = torch.zeros(3, dtype=torch.float64, device=device)
        """`[3]` sum of the loss, number of tokens, and how many of them were predicted right; without what
        the caller gave as plain numbers (`host_values`)."""
        self._suspect_t = torch.zeros((), dtype=torch.float64, device=device)
        """Number of the micro-batch to blame plus one; 0: none, or the loop does not tell them apart."""
        self._squares_t = torch.zeros_like(self._suspect_t)
        self._largest_change_t = torch.zeros_like(self._suspect_t)
        self._loss_sum_t, self._tokens_t, self._correct_t = self.loss_t.unbind()

    def add_mean(self, loss: Tensor, weight: Tensor | float, *, is_whole_step: bool = False) -> None:
        """Counts one more micro-batch, or all of the step's as one, of which there is the mean loss.

        Raises:
            ConfigError: the loss or the weight is not one real number, or tokens were counted before.
        """
        self._require_one_unit(counts_tokens=False)
        loss = checked_loss(loss, self.loss_t.device)
        weight = checked_count(weight, "the weight", self.loss_t.device)
        self._add(loss if weight == 1.0 else loss.double() * weight, weight, 0.0)
        self._is_whole_step = is_whole_step and self.num == 1

    def add_sum(self, loss_sum: Tensor, num_tokens: Tensor | float, num_correct: Tensor | float) -> None:
        """Counts one more micro-batch, of which there is the sum of the loss over its tokens.

        Raises:
            ConfigError: the loss is not one real number, a count is not one, or means were given before.
        """
        self._require_one_unit(counts_tokens=True)
        self._add(checked_loss(loss_sum, self.loss_t.device), num_tokens, num_correct)

    def _require_one_unit(self, *, counts_tokens: bool) -> None:
        if self.num and self.counts_tokens != counts_tokens:
            raise ConfigError(
                "some micro-batches of a step with num_tokens, and some without",
                rule="the losses of a step are all sums over tokens, or all means with weights",
                remedy="call accumulate(loss_sum, num_tokens), or accumulate(loss, weight=...), after each",
            )
        self.counts_tokens = counts_tokens

    def _add(self, loss_sum: Tensor, num_tokens: Tensor | float, num_correct: Tensor | float) -> None:
        device = self.loss_t.device
        num_tokens = checked_count(num_tokens, "the number of tokens", device)
        num_correct = checked_count(num_correct, "the number predicted right", device)
        self._loss_sum_t.add_(loss_sum)
        # What lies on the device is not read; what lies on the host is not copied by itself, but goes along
        # with the step's other host values.
        if isinstance(num_tokens, Tensor):
            self._tokens_t.add_(num_tokens)
        else:
            self._num_tokens += num_tokens
        if isinstance(num_correct, Tensor):
            self._correct_t.add_(num_correct)
        else:
            self._num_correct += num_correct
        self.num += 1

    def host_values(self) -> tuple[float, float, float, int]:
        """What the host knows: three numbers to add to `loss_t`, and the number of the last micro-batch, -1
        if the loop does not tell them apart."""
        number = -1 if self._is_whole_step else self.num - 1
        return 0.0, self._num_tokens, self._num_correct, number

    def suspect(self) -> Tensor:
        """0-d, the number of the micro-batch to blame if the step goes wrong; -1: not known."""
        return self._suspect_t - 1

    def note_gradient(self, rows: Tensor, number: Tensor | int, *, unscaled_by: Tensor | float = 1.0) -> None:
        """Takes `[P, 5]` of the gradient as micro-batch `number` left it; twice the same does no harm.

        Args:
            unscaled_by: What the gradient has been divided by since the micro-batches before were noted.
        """
        squares = rows[:, SUM_SQUARES].sum() * unscaled_by**2
        bad = bad_rows(rows).any() | ~self._loss_sum_t.isfinite()
        # Infinite, so that the first micro-batch that leaves anything bad wins over every finite change, and
        # no later one wins over it: infinity is not greater than infinity.
        change = torch.where(bad, torch.inf, (squares - self._squares_t).abs())
        worse = change > self._largest_change_t
        # In place: a CUDA graph reads and writes these tensors at fixed addresses.
        self._suspect_t.copy_(torch.where(worse, number + 1, self._suspect_t))
        torch.maximum(change, self._largest_change_t, out=self._largest_change_t)
        self._squares_t.copy_(squares)

    def clear(self) -> None:
        """Begins the next step."""
        self.num = 0
        self._is_whole_step = False
        self._num_tokens, self._num_correct = 0.0, 0.0
        torch._foreach_zero_([self.loss_t, self._suspect_t, self._squares_t, self._largest_change_t])
