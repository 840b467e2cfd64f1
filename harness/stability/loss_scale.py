"""Dynamic loss scaling for fp16, kept on the device and moved by the guard's own verdict."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.errors import ConfigError

__all__ = ["LossScale"]

MAX_SCALE = 2.0**24


class LossScale:
    """A factor on the loss that keeps small fp16 gradients from vanishing.

    Halved by a step whose gradient overflowed under a finite loss, doubled after `growth_steps` clean ones; a
    loss that is itself not finite says nothing about the scale and leaves it alone. Off: the constant 1.
    """

    def __init__(self, initial: float, *, growth_steps: int, device: torch.device, enabled: bool) -> None:
        self.enabled = enabled
        self._is_borrowed = False
        self.value_t = torch.tensor(initial if enabled else 1.0, dtype=torch.float32, device=device)
        self._growth_steps = growth_steps
        self._clean_steps_t = torch.zeros((), dtype=torch.int32, device=device)

    def follow(self, scale_t: Tensor | None) -> None:
        """Takes over the scale of the loop's own GradScaler for a step; None: the loss is not scaled by one.

        Raises:
            ConfigError: the guard scales losses itself.
        """
        if scale_t is not None and self.enabled:
            raise ConfigError(
                "a GradScaler was handed to a guard with precision=torch.float16",
                rule="one of the two scales the loss",
                remedy="leave precision out, or the GradScaler and call guard.scale(loss).backward()",
            )
        if scale_t is not None:
            self.value_t.copy_(scale_t)
        elif self._is_borrowed:
            self.value_t.fill_(1.0)
        self._is_borrowed = scale_t is not None

    def update(self, *, overflowed_t: Tensor, skip_t: Tensor) -> None:
        """Moves the scale by what became of a step. In place, without synchronising."""
        if not self.enabled:
            return
        clean = torch.where(skip_t, 0, self._clean_steps_t + 1)
        grow = clean >= self._growth_steps
        factor = torch.where(overflowed_t, 0.5, torch.where(grow, 2.0, 1.0))
        self.value_t.mul_(factor).clamp_(1.0, MAX_SCALE)
        self._clean_steps_t.copy_(torch.where(grow, 0, clean))

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the state, on the device."""
        return {"scale": self.value_t.clone(), "clean_steps": self._clean_steps_t.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes over `state`; ignored while scaling is off."""
        if self.enabled:
            self.value_t.copy_(state["scale"])
            self._clean_steps_t.copy_(state["clean_steps"])
