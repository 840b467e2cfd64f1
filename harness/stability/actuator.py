"""Carries a decision out on an optimizer: on the device where it can, else by one question a step."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import LBFGS, SGD, Adam, Optimizer

from harness.errors import ConfigError
from harness.stability.sources import gradients_of
from harness.stability.verdict import Decision

__all__ = ["Actuator"]

logger = logging.getLogger(__name__)


class Actuator:
    """Steps an optimizer by decisions.

    Fused Adam, AdamW, SGD and Adagrad read `found_inf` and `grad_scale` on the device and leave parameters
    and state alone, or divide the gradients, in the one pass that they make anyway. Any other optimizer costs
    a synchronisation per step and, when it clips, a pass over the gradients. A step in which a fused
    optimizer creates state synchronises too: fused SGD leaves momentum uninitialised in a step that it skips.

    Raises:
        ConfigError: the optimizer evaluates the model itself (LBFGS), or is one that torch cannot run on
            sharded parameters.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        # accelerate and others wrap the optimizer; the attributes have to reach the one that computes.
        while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
            optimizer = inner
        if isinstance(optimizer, LBFGS):
            raise ConfigError(
                "the optimizer is LBFGS",
                rule="a guarded optimizer takes one gradient and makes one step",
                remedy="use fused AdamW, or another first-order optimizer",
            )
        self.optimizer = optimizer
        self._fused = all(group.get("fused") for group in optimizer.param_groups)
        self._refuse_what_torch_cannot_do()
        self._has_all_state = False
        if not self._fused:
            logger.warning(
                "%s reads the guard's verdict on the host, one synchronisation per step; pass fused=True to "
                "Adam, AdamW, SGD or Adagrad to avoid it",
                type(optimizer).__name__,
            )

    def _refuse_what_torch_cannot_do(self) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        sharded = any(isinstance(p, DTensor) for p in parameters)
        if self._fused and sharded and not isinstance(self.optimizer, Adam):
            raise ConfigError(
                f"fused {type(self.optimizer).__name__} over parameters sharded by FSDP2",
                rule="of torch's fused optimizers only Adam and AdamW take sharded parameters",
                remedy="use fused AdamW, or the same optimizer with fused=False",
            )

    def carry_out(self, decision: Decision) -> None:
        """Steps the optimizer, or not. Synchronises only where the class says so."""
        if not (self._fused and self._state_exists()):
            skip, divisor = torch.stack([decision.found_inf_t, decision.grad_scale_t]).tolist()
            if skip:
                return
            if not self._fused:
                if divisor != 1.0:
                    torch._foreach_div_(self._gradients(), divisor)
                self.optimizer.step()
                return
        with self._told(decision):
            self.optimizer.step()

    @contextmanager
    def _told(self, decision: Decision) -> Iterator[None]:
        """Within it the optimizer has the two attributes that fused implementations look for."""
        self.optimizer.found_inf = decision.found_inf_t  # type: ignore[attr-defined]
        self.optimizer.grad_scale = decision.grad_scale_t  # type: ignore[attr-defined]
        try:
            yield
        finally:
            del self.optimizer.found_inf, self.optimizer.grad_scale  # type: ignore[attr-defined]

    def _state_exists(self) -> bool:
        """Whether every parameter that takes part in this step has its optimizer state already."""
        if not self._has_all_state:
            stateful = [
                p
                for group in self.optimizer.param_groups
                if not (isinstance(self.optimizer, SGD) and group["momentum"] == 0)
                for p in group["params"]
                if p.requires_grad
            ]
            self._has_all_state = all(self.optimizer.state.get(p) for p in stateful)
            return all(self.optimizer.state.get(p) for p in stateful if p.grad is not None)
        return True

    def _gradients(self) -> list[Tensor]:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        return gradients_of(parameters)[1]
