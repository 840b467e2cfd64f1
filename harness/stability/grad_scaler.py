"""The loop's own `torch.amp.GradScaler`, where it keeps one: its scale is taken, its bookkeeping done.

A loss that a scaler has multiplied by 65,536 without the guard knowing gives gradients that are all clipped
to nothing. So a scaler is handed over, or found. Its private attributes are used here alone: `_scale`,
because the public `get_scale` synchronises, and `_per_optimizer_states`, in which `update` looks for what
`step` has left.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState

from harness.errors import ConfigError

__all__ = ["ScaledGradients", "refuse_forgotten_scaler"]


class ScaledGradients:
    """What a scaler did to the gradients of one step.

    Args:
        optimizers: What `unscale_` may have been called with.
        updates: `update` is called by nobody else.

    Raises:
        ConfigError: the scaler has scaled nothing, has unscaled for some of the optimizers only, or was not
            updated since the last step.
    """

    def __init__(self, scaler: GradScaler, optimizers: Iterable[Any], *, updates: bool) -> None:
        self._scaler: Any = scaler
        self._optimizers = list(optimizers)
        self._updates = updates
        if self._scaler._scale is None:
            raise ConfigError(
                "a GradScaler that has scaled no loss yet was handed to step()",
                rule="its scale has to be in the gradients",
                remedy="call scaler.scale(loss).backward(), or leave the scaler out",
            )
        self.scale_t: Tensor = self._scaler._scale
        """0-d fp32 on the device."""
        stages = {self._scaler._per_optimizer_states[id(one)]["stage"] for one in self._optimizers}
        if len(stages) > 1:
            raise ConfigError(
                "the GradScaler has unscaled the gradients of some of the guard's optimizers only",
                rule="all gradients of a guarded step have the same scale",
                remedy="leave scaler.unscale_ out: the guard unscales by itself",
            )
        if OptState.STEPPED in stages:
            raise ConfigError(
                "a second step() with the same GradScaler, and no update() in between",
                rule="its scale follows what became of each step",
                remedy="call scaler.update() after guard.step(loss, scaler=scaler)",
            )
        self.is_unscaled = stages == {OptState.UNSCALED}
        """Whether the loop called `unscale_` before the guard's step."""

    def note_outcome(self, overflowed_t: Tensor) -> None:
        """Leaves what `update` needs; a later `scaler.step` is refused by the scaler itself."""
        for optimizer in self._optimizers:
            state = self._scaler._per_optimizer_states[id(optimizer)]
            state["found_inf_per_device"] = {overflowed_t.device: overflowed_t.float()}
            state["stage"] = OptState.STEPPED
        if self._updates:
            self._scaler.update()


def refuse_forgotten_scaler() -> None:
    """Looks through all objects of the process, once, for a scaler that is in use.

    Raises:
        ConfigError: there is one.
    """
    for one in gc.get_objects():
        # By class, since isinstance asks proxies and lazy modules for attributes that they make up.
        # One that is disabled, as where the precision is not fp16, has no `_scale`.
        if issubclass(type(one), torch.amp.GradScaler) and one.is_enabled() and one._scale is not None:
            raise ConfigError(
                f"a GradScaler is in use (its scale is {one.get_scale():g}) and step() was not given it",
                rule="the guard has to know by what the gradients were multiplied",
                remedy="call guard.step(loss, scaler=scaler) in place of scaler.unscale_ and scaler.step, "
                "then scaler.update(); if it scales another model's loss, guard.step(loss, scaler=None)",
            )
