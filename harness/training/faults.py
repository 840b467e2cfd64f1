"""Rehearsed faults: values that go bad and processes that stall or die, at a chosen step and rank.

They strike where real ones do: a gradient inside the backward pass, before any reduction; an activation in
the forward pass; the loss; the input. Off unless `faults` are configured, and loud when they are.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from harness.config import FaultConfig
from harness.data import Batch, LossSum
from harness.errors import ConfigError

__all__ = ["FaultInjector", "poison"]

_PROCESS_FAULTS = ("slow", "kill", "hang")

logger = logging.getLogger(__name__)


class FaultInjector:
    """Holds this rank's faults and strikes, once each, when their step and micro-batch come.

    Args:
        faults: The faults of all ranks; targets are checked for all of them, so that every rank fails alike.
        model: The model without DDP around it.

    Raises:
        ConfigError: a fault names a parameter or module that the model does not have.
    """

    def __init__(self, faults: Sequence[FaultConfig], *, model: nn.Module, rank: int) -> None:
        self._model = model
        self._targets = {fault: _target(fault, model) for fault in faults}
        self._mine = [fault for fault in faults if fault.rank == rank]
        self._loss_faults: list[FaultConfig] = []
        for fault in self._mine:
            logger.warning("fault armed: %s", describe(fault))

    @contextmanager
    def armed(self, step: int, micro_batch: int, batch: Batch) -> Iterator[None]:
        """Within it the faults of this step and micro-batch are in force; `batch` may be changed by them."""
        due = [fault for fault in self._mine if (fault.step, fault.micro_batch) == (step, micro_batch)]
        with ExitStack() as stack:
            for fault in due:
                logger.warning("fault strikes: %s", describe(fault))
                self._mine.remove(fault)  # once: a rollback passes the same step again
                self._strike(fault, batch, stack)
            yield
        self._loss_faults.clear()

    def on_loss(self, loss: LossSum) -> LossSum:
        """The loss, poisoned if a fault that is in force says so."""
        for fault in self._loss_faults:
            loss = dataclasses.replace(loss, total=loss.total * _factor(fault, loss.total.dtype))
        return loss

    def _strike(self, fault: FaultConfig, batch: Batch, stack: ExitStack) -> None:
        if fault.kind in _PROCESS_FAULTS:
            _strike_process(fault)
        elif fault.target == "loss":
            self._loss_faults.append(fault)
        elif fault.target == "batch":
            _strike_batch(fault, batch)
        elif fault.target == "activation":
            module = self._model.get_submodule(self._targets[fault])
            stack.callback(module.register_forward_hook(partial(_poison_output, fault)).remove)
        else:
            owner, _, leaf = self._targets[fault].rpartition(".")
            hook = partial(_poison_gradient_of, fault, leaf, stack)
            stack.callback(self._model.get_submodule(owner).register_forward_pre_hook(hook).remove)


def describe(fault: FaultConfig) -> str:
    """One line for the log."""
    where = "process" if fault.kind in _PROCESS_FAULTS else f"{fault.target} {fault.parameter or ''}".strip()
    return f"{fault.kind} in {where} of rank {fault.rank}, step {fault.step}, micro-batch {fault.micro_batch}"


def poison(tensor: torch.Tensor, fault: FaultConfig) -> torch.Tensor:
    """A copy of `tensor` with its first element gone bad, or all of it `scale` times too large (spike)."""
    if fault.kind == "spike":
        return tensor * fault.scale
    bad = tensor.clone(memory_format=torch.contiguous_format)
    bad.view(-1)[:1] = _factor(fault, tensor.dtype)
    return bad


def _factor(fault: FaultConfig, dtype: torch.dtype) -> float:
    if fault.kind == "spike":
        return fault.scale
    if fault.kind == "overflow":
        return float(16 * torch.finfo(dtype).max ** 0.5)  # finite, and its square is not
    return float(fault.kind)


def _target(fault: FaultConfig, model: nn.Module) -> str:
    """Full name of the parameter or module that `fault` strikes; empty where it strikes neither."""
    if fault.kind in _PROCESS_FAULTS or fault.target in ("loss", "batch"):
        return ""
    if fault.target == "gradient":
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    else:
        names = [name for name, module in model.named_modules() if name and not list(module.children())]
    if fault.parameter is None:
        return names[0]
    if fault.parameter not in names:
        raise ConfigError(
            f"faults.parameter is {fault.parameter!r}",
            rule=f"a fault in the {fault.target} names one of the model's: {names[0]}, ..., {names[-1]}",
        )
    return fault.parameter


def _strike_process(fault: FaultConfig) -> None:
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(fault.seconds if fault.kind == "slow" else float(2**31))


def _strike_batch(fault: FaultConfig, batch: Batch) -> None:
    for name, tensor in batch.items():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            batch[name] = poison(tensor, fault)
            return
    logger.warning("fault without effect: the batch holds no floating-point tensor")


def _poison_output(fault: FaultConfig, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return poison(output, fault)


def _poison_gradient_of(
    fault: FaultConfig, leaf: str, stack: ExitStack, module: nn.Module, args: Any
) -> None:
    # Taken in the forward pass, because only then does FSDP2 hold the whole parameter.
    parameter = getattr(module, leaf)
    if parameter.requires_grad and torch.is_grad_enabled():
        stack.callback(parameter.register_hook(lambda gradient: poison(gradient, fault)).remove)
