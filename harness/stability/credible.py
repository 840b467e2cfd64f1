"""What no rule is needed for: a gradient norm so far beyond the run's usual ones that it cannot be meant."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["CredibleNorm"]

WINDOW = 64
"""Norms that are remembered."""

RANK = 8
"""The usual norm is the eighth largest of them: so many are needed at least, fewer large ones do not raise
it, and up to 56 small ones (batches that are nearly all padding) do not lower it."""

LEAST_SHARE = 0.01
"""Of the norm that gradients are clipped to: so much is usual in any case. A run may begin with batches that
teach nothing (equal rewards), whose norms are rounding errors."""


class CredibleNorm:
    """Finds gradients that are finite and absurd: of more than `ratio` times the usual norm.

    The usual norm is that of the larger of the last 64. An absurd one leaves a gap among them: it teaches
    nothing, and after 57 in a row, all left out, there is no usual norm any more. Norms as far below the
    usual one as absurd ones are above it are no measure and are not remembered, nor are those of steps that
    are not finite. About 20 small kernels a step.

    Args:
        ratio: Times the usual norm; 0 or None: every finite norm is credible.
        max_norm: What gradients are clipped to; None: they are not.
    """

    def __init__(self, ratio: float | None, *, max_norm: float | None = None) -> None:
        self._log_ratio = math.log(ratio) if ratio else math.inf
        self._least = math.log(LEAST_SHARE * max_norm) if max_norm else -math.inf
        self._log_norms: Tensor | None = None

    def check(self, norm: Tensor, trusted: Tensor) -> tuple[Tensor, Tensor]:
        """Whether the step's norm is absurd (0-d bool), and the usual norm (0-d; 0: none yet). Does not
        synchronise, and keeps its state in place.

        Args:
            norm: 0-d float64, of the true gradient, without loss scale and before clipping.
            trusted: 0-d bool, the step has no NaN and no Inf.
        """
        if self._log_ratio == math.inf:
            return torch.zeros_like(trusted), torch.zeros_like(norm)
        log_norms = self._on(norm.device)
        log_norm = norm.log()
        usual = log_norms.sort(descending=True).values[RANK - 1]
        is_known = usual > -torch.inf
        absurd = trusted & is_known & (log_norm - usual.clamp(min=self._least) > self._log_ratio)
        remembered = trusted & ~(is_known & (usual - log_norm > self._log_ratio)) & (norm > 0)
        newest = torch.where(absurd, -torch.inf, log_norm).reshape(1)
        log_norms.copy_(torch.where(remembered, torch.cat([log_norms[1:], newest]), log_norms))
        return absurd, usual.exp()

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the state, on the device; empty before the first step."""
        return {} if self._log_norms is None else {"log_norms": self._log_norms.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Goes on from what `state_dict` gave; in place, for a CUDA graph may know the address."""
        saved = state.get("log_norms", torch.full((WINDOW,), -torch.inf, dtype=torch.float64))
        if self._log_norms is None:
            self._log_norms = saved.detach().clone()
        else:
            self._log_norms.copy_(saved)

    def _on(self, device: torch.device) -> Tensor:
        """The window of log norms, `[64]` float64 on `device`, oldest first; -inf: no norm."""
        if self._log_norms is None:
            self._log_norms = torch.full((WINDOW,), -torch.inf, dtype=torch.float64, device=device)
        elif self._log_norms.device != device:
            self._log_norms = self._log_norms.to(device)
        return self._log_norms
