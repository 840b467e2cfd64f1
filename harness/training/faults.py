"""Rehearsed faults: values that go bad and processes that stall or die, at a chosen step and rank.

They strike where real ones do: a gradient inside the backward pass, before any reduction; an activation in
the forward pass; the loss; the input. Off unless `faults` are configured, and loud when they are: what cannot
strike is refused before the run, and what did not strike in its micro-batch after all is said. A fault
strikes once in a run, whatever rolls back or starts again after it: what has struck is noted there.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from harness.config import FaultConfig, TrainConfig
from harness.data import Batch, LossSum
from harness.errors import ConfigError

__all__ = ["FaultInjector", "describe", "poison", "possible_faults"]

_PROCESS_FAULTS = ("slow", "kill", "hang")

logger = logging.getLogger(__name__)


@dataclasses.dataclass(slots=True)
class _Strike:
    """A fault in force, and whether it has struck."""

    fault: FaultConfig
    note: Path | None
    """The file that tells later attempts that it has struck."""
    struck: bool = False
    hooked: bool = False

    def hit(self) -> FaultConfig:
        """Notes, and says once, that the fault strikes; before it does, for it may end this process."""
        if not self.struck:
            self.struck = True
            logger.warning("fault strikes: %s", describe(self.fault))
            if self.note is not None:
                self.note.parent.mkdir(exist_ok=True)
                self.note.touch()
        return self.fault


class FaultInjector:
    """Holds this rank's faults and strikes, once each, when their step and micro-batch come.

    Args:
        faults: The faults of all ranks; targets are checked for all of them, so that every rank fails alike.
        model: The model without DDP around it; it may be compiled, or sharded later.
        sample: A batch as the loader makes them; asked for only if a fault strikes the batch.

    Raises:
        ConfigError: a fault names a parameter or module that the model does not have, or strikes a batch in
            which nothing can be bad.
    """

    def __init__(
        self,
        faults: Sequence[FaultConfig],
        *,
        model: nn.Module,
        rank: int,
        sample: Callable[[], Batch] | None = None,
    ) -> None:
        self._model = model
        self._targets = {fault: _target(fault, model) for fault in faults}
        if sample is not None and any(_is_in_batch(fault) for fault in faults):
            _check_batch(sample())
        self._mine = [fault for fault in faults if fault.rank == rank]
        self._loss_faults: list[_Strike] = []
        self._notes: Path | None = None

    def begin_at(self, step: int, notes: Path | None = None) -> None:
        """Drops what a run that goes on has behind it: faults of the steps before `step`, and those that have
        struck in an earlier attempt.

        Args:
            notes: Folder in the run's directory where is noted what has struck.
        """
        self._notes = notes
        for fault in list(self._mine):
            note = self._note(fault)
            if fault.step < step:
                logger.warning("fault is past, %d steps are done: %s", step, describe(fault))
            elif note is not None and note.exists():
                logger.warning("fault has struck in an earlier attempt: %s", describe(fault))
            else:
                logger.warning("fault armed: %s", describe(fault))
                continue
            self._mine.remove(fault)

    def _note(self, fault: FaultConfig) -> Path | None:
        name = re.sub(r"[^\w.]+", "-", describe(fault))
        return None if self._notes is None else self._notes / name

    @contextmanager
    def armed(self, step: int, micro_batch: int, batch: Batch) -> Iterator[None]:
        """Within it the faults of this step and micro-batch are in force; `batch` may be changed by them."""
        due = [fault for fault in self._mine if (fault.step, fault.micro_batch) == (step, micro_batch)]
        strikes = [_Strike(fault, self._note(fault)) for fault in due]
        with ExitStack() as stack:
            for strike in strikes:
                self._mine.remove(strike.fault)  # once: a rollback passes the same step again
                self._strike(strike, batch, stack)
            yield
        self._loss_faults.clear()
        for strike in strikes:
            if not strike.struck:
                logger.error("fault missed, nothing passed there: %s", describe(strike.fault))

    def on_loss(self, loss: LossSum) -> LossSum:
        """The loss, poisoned if a fault that is in force says so."""
        for strike in self._loss_faults:
            factor = _factor(strike.hit(), loss.total.dtype)
            loss = dataclasses.replace(loss, total=loss.total * factor)
        return loss

    def _strike(self, strike: _Strike, batch: Batch, stack: ExitStack) -> None:
        fault = strike.fault
        if fault.kind in _PROCESS_FAULTS:
            _strike_process(strike.hit())
        elif fault.target == "loss":
            self._loss_faults.append(strike)
        elif fault.target == "batch":
            _strike_batch(strike, batch)
        elif fault.target == "activation":
            _run_uncompiled(stack)
            module = self._model.get_submodule(self._targets[fault])
            stack.callback(module.register_forward_hook(partial(_poison_output, strike)).remove)
        else:
            self._strike_gradient(strike, stack)

    def _strike_gradient(self, strike: _Strike, stack: ExitStack) -> None:
        name = self._targets[strike.fault]
        parameter = self._model.get_parameter(name)
        if not isinstance(parameter, DTensor):
            stack.callback(parameter.register_hook(partial(_poison_gradient, strike)).remove)
            return
        # Only within the forward pass of the module that shards it does FSDP2 hold the whole parameter.
        _run_uncompiled(stack)
        hook = partial(_hook_whole, strike, self._model, name, stack)
        stack.callback(_sharder(self._model, name).register_forward_pre_hook(hook).remove)


def possible_faults(config: TrainConfig, *, rank: int, world_size: int) -> list[FaultConfig]:
    """Those of the configuration that can strike at this number of ranks; rank 0 says which cannot."""
    inert = config.inert_faults(world_size)
    if rank == 0:
        for fault, (_, rule) in inert.items():
            logger.warning("fault does not strike, %s: %s", rule, describe(fault))
    return [fault for fault in config.faults if fault not in inert]


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
        first = names[0]
    else:
        modules = {name: module for name, module in model.named_modules() if _has_forward(module)}
        names = list(modules)
        first = next(name for name in names if not list(modules[name].children()))
    if fault.parameter is None:
        return first
    if fault.parameter not in names:
        raise ConfigError(
            f"faults.parameter is {fault.parameter!r}",
            rule=f"a fault in the {fault.target} names one of the model's: {first}, ..., {names[-1]}",
        )
    return fault.parameter


def _has_forward(module: nn.Module) -> bool:
    """Whether the module can be called; a ModuleList cannot."""
    return type(module).forward is not nn.Module.forward


def _is_in_batch(fault: FaultConfig) -> bool:
    return fault.kind not in _PROCESS_FAULTS and fault.target == "batch"


def _check_batch(batch: Batch) -> None:
    if _first_floating(pytree.tree_leaves(dict(batch))) is None:
        kinds = ", ".join(f"{name} ({_kind(value)})" for name, value in batch.items())
        raise ConfigError(
            f"faults.target is 'batch', and a batch holds {kinds}",
            rule="only floating-point numbers can be NaN, infinite or out of range",
            remedy="set target: activation",
        )


def _kind(value: Any) -> str:
    return (
        str(value.dtype).removeprefix("torch.") if isinstance(value, torch.Tensor) else type(value).__name__
    )


def _strike_process(fault: FaultConfig) -> None:
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(fault.seconds if fault.kind == "slow" else float(2**31))


def _strike_batch(strike: _Strike, batch: Batch) -> None:
    batch.update(_poisoned(strike, dict(batch)))


def _run_uncompiled(stack: ExitStack) -> None:
    """A compiled module does not see hooks that came after its compilation: it is run as it was written."""
    stack.enter_context(torch.compiler.set_stance("force_eager"))


def _poison_output(strike: _Strike, module: nn.Module, args: Any, output: Any) -> Any:
    return _poisoned(strike, output)


def _poisoned(strike: _Strike, value: Any) -> Any:
    """`value` with the first floating-point tensor poisoned, at whatever depth of tuples, lists and dicts."""
    leaves, structure = pytree.tree_flatten(value)
    first = _first_floating(leaves)
    if first is None:
        return value
    leaves[first] = poison(leaves[first], strike.hit())
    return pytree.tree_unflatten(leaves, structure)


def _first_floating(leaves: Sequence[Any]) -> int | None:
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.numel():
            return index
    return None


def _poison_gradient(strike: _Strike, gradient: torch.Tensor) -> torch.Tensor:
    return poison(gradient, strike.hit())


def _sharder(model: nn.Module, name: str) -> nn.Module:
    """The innermost module around the parameter that is a unit of FSDP2."""
    path = name.split(".")[:-1]
    above = [model.get_submodule(".".join(path[:depth])) for depth in range(len(path), -1, -1)]
    return next(module for module in above if isinstance(module, FSDPModule))


def _hook_whole(
    strike: _Strike, model: nn.Module, name: str, stack: ExitStack, module: nn.Module, args: Any
) -> None:
    # Activation checkpointing passes here twice, and may do so the first time without gradients.
    if torch.is_grad_enabled() and not strike.hooked:
        strike.hooked = True
        whole = model.get_parameter(name)
        stack.callback(whole.register_hook(partial(_poison_gradient, strike)).remove)
