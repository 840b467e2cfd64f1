"""The optimizers that a guard steps: whatever has parameter groups and a step, one or several.

The place that knows of wrappers. Accelerate's is transparent: it decides when a step is made and keeps the
loop's GradScaler, and both are asked for here. Every other wrapper does something of its own (Lookahead,
masters in fp32, a partition among ranks), so its own `step` is what is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer

from harness.errors import ConfigError

__all__ = ["Optimizers", "StateOf"]

StateOf = Callable[[nn.Parameter], Mapping[str, Any]]
"""Gives what an optimizer remembers of a parameter; empty before its first step."""


class Optimizers:
    """All optimizers of one guard, in the order in which they are stepped.

    Raises:
        ConfigError: there is none; one has no parameter groups or no `step`; one evaluates the model itself
            (LBFGS).
    """

    def __init__(self, optimizers: Optimizer | Sequence[Optimizer]) -> None:
        given = optimizers if isinstance(optimizers, (list, tuple)) else (optimizers,)
        self.wrapped: tuple[Any, ...] = tuple(given)
        """As the caller gave them, in accelerate's wrappers if it wraps them."""
        self.unwrapped: tuple[Any, ...] = tuple(map(_unwrapped, self.wrapped))
        """Without accelerate's wrappers: what `step` is called on."""
        if not self.unwrapped:
            raise ConfigError("no optimizer", rule="a guard steps at least one")
        for optimizer in self.unwrapped:
            _refuse_unfit(optimizer)

    @property
    def held(self) -> list[nn.Parameter]:
        """All parameters that they hold now."""
        return [
            p for optimizer in self.unwrapped for group in optimizer.param_groups for p in group["params"]
        ]

    @property
    def changed(self) -> list[nn.Parameter]:
        """Those that a step may change: what takes a gradient, or was frozen with one still in it."""
        return [p for p in self.held if p.requires_grad or p.grad is not None]

    @property
    def signature(self) -> tuple[object, ...]:
        """Equal as long as a step may change the same parameters: nothing was added, taken out, replaced,
        frozen or thawed."""
        held = self.held
        return (*map(id, held), *(p.requires_grad or p.grad is not None for p in held))

    def state_of(self, parameter: nn.Parameter) -> Mapping[str, Any]:
        """What its optimizer remembers of a parameter; empty before its first step."""
        for optimizer in self.unwrapped:
            state: Mapping[str, Any] | None = getattr(optimizer, "state", {}).get(parameter)
            if state:
                return state
        return {}

    @property
    def is_accumulating(self) -> bool:
        """Whether accelerate says that this micro-batch is not the last of its step. Equal on all ranks."""
        return any(not one.gradient_state.sync_gradients for one in self.wrapped if _is_accelerated(one))

    @property
    def are_accelerated(self) -> bool:
        """Whether accelerate prepared all of them, and so scales their losses itself or not at all."""
        return all(map(_is_accelerated, self.wrapped))

    @property
    def grad_scaler(self) -> torch.amp.GradScaler | None:
        """The GradScaler with which accelerate scales losses, if it does."""
        scalers = (one.scaler for one in self.wrapped if _is_accelerated(one))
        return next((scaler for scaler in scalers if scaler is not None), None)

    def refuse_shared(self) -> None:
        """Refuses what would be stepped twice in a step.

        Raises:
            ConfigError: a parameter is in two optimizers, or twice in one.
        """
        num_twice = len(self.held) - len(set(map(id, self.held)))
        if num_twice:
            raise ConfigError(
                f"{num_twice} parameters are held by two optimizers, or twice by one",
                rule="a parameter is stepped once a step",
                remedy="give each parameter to one optimizer",
            )


def _unwrapped(optimizer: Any) -> Any:
    while _is_accelerated(optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _is_accelerated(optimizer: Any) -> bool:
    # By name: accelerate is not imported here, and need not be there at all.
    kinds = type(optimizer).__mro__
    return any((k.__module__, k.__name__) == ("accelerate.optimizer", "AcceleratedOptimizer") for k in kinds)


def _refuse_unfit(optimizer: Any) -> None:
    if isinstance(optimizer, LBFGS):
        raise ConfigError(
            "the optimizer is LBFGS",
            rule="a guarded optimizer takes one gradient and makes one step",
            remedy="use fused AdamW, or another first-order optimizer",
        )
    if not (callable(getattr(optimizer, "step", None)) and hasattr(optimizer, "param_groups")):
        raise ConfigError(
            f"a {type(optimizer).__name__} in place of an optimizer",
            rule="it needs param_groups, as torch.optim.Optimizer has them, and a step()",
            remedy="pass the optimizer itself, or a list of optimizers",
        )
