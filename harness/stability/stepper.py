"""Steps the optimizers as decided: on the device where they can, else with one synchronisation a step."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adagrad, Adam
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from harness.errors import ConfigError
from harness.stability.fused_check import FusedCheck
from harness.stability.optimizers import Optimizers
from harness.stability.sources import gradients_of
from harness.stability.verdict import Decision

__all__ = ["OptimizerStepper"]

HONOURING = {inspect.unwrap(kind.step) for kind in (Adam, SGD, Adagrad)}
"""Step functions that, fused, honour `found_inf` and `grad_scale` (torch 2.13). AdamW's is Adam's."""

HONOURING_DEVICES = {"cpu", "cuda"}
"""On MPS fused Adam ignored both (pytorch #186360)."""

logger = logging.getLogger(__name__)


class OptimizerStepper:
    """Steps optimizers by decisions.

    Fused Adam, AdamW, SGD and Adagrad read `found_inf` and `grad_scale` on the device and leave parameters
    and state alone, or divide the gradients, in the one pass that they make anyway. Only torch's own step
    functions are trusted with that, without hooks on the step, and they are checked until they have proven
    it (`FusedCheck`). Any other optimizer is called only for steps that are applied, with gradients that are
    clipped already; that costs a synchronisation per step and, when it clips, a pass over the gradients. A
    step in which a fused optimizer creates state synchronises too: fused SGD leaves momentum uninitialised in
    a step that it skips. How an optimizer is set up is read anew in every step.

    Raises:
        ConfigError: an optimizer is one that torch cannot run on sharded parameters.
    """

    def __init__(self, optimizers: Optimizers, *, device: torch.device) -> None:
        self._optimizers = optimizers
        self.fused_check = FusedCheck(device)
        self._warned_of: set[str] = set()
        for optimizer in optimizers.unwrapped:
            if not self._is_fused(optimizer):
                self._warn_once(optimizer)
        self.reset()

    def reset(self) -> None:
        """Forgets which parameters have optimizer state, because the optimizers hold others now."""
        self._stateless = {id(optimizer): _Stateless(optimizer) for optimizer in self._optimizers.unwrapped}

    def step(self, step: int, decision: Decision) -> None:
        """Steps the optimizers, or not. Synchronises only where the class says so."""
        fused = [optimizer for optimizer in self._optimizers.unwrapped if self._is_fused(optimizer)]
        by_device = [one for one in fused if not self._stateless[id(one)].is_to_make_state()]
        skip, divisor = False, 1.0
        if len(by_device) < len(self._optimizers.unwrapped):
            skip, divisor = torch.stack([decision.found_inf_t, decision.grad_scale_t]).tolist()
        for optimizer in (*self._optimizers.wrapped, *self._optimizers.unwrapped):
            _tell_scheduler(optimizer)
        with self.fused_check.checking(step, by_device, decision):
            for optimizer in self._optimizers.unwrapped:
                if optimizer in by_device or (optimizer in fused and not skip):
                    with _with_verdict(optimizer, decision):
                        optimizer.step()
                elif not skip:
                    _scale_gradients(optimizer, divisor)
                    optimizer.step()

    def _is_fused(self, optimizer: Any) -> bool:
        """Whether it takes the verdict on the device."""
        if not all(group.get("fused") for group in optimizer.param_groups):
            self._warn_once(optimizer)
            return False
        devices = {p.device.type for group in optimizer.param_groups for p in group["params"][:1]}
        step = inspect.unwrap(optimizer.step, stop=_is_foreign)
        honours = getattr(step, "__func__", step) in HONOURING and devices <= HONOURING_DEVICES
        if honours and not _has_step_hooks(optimizer):
            _refuse_sharded(optimizer)
            return True
        self._warn_once(optimizer)
        return False

    def _warn_once(self, optimizer: Any) -> None:
        name = type(optimizer).__name__
        if name not in self._warned_of:
            self._warned_of.add(name)
            logger.warning(
                "%s reads the guard's verdict on the host, one synchronisation per step; torch's own Adam, "
                "AdamW, SGD and Adagrad with fused=True and without step hooks avoid it",
                name,
            )


class _Stateless:
    """Which of an optimizer's parameters have no optimizer state yet."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._seen: tuple[object, ...] = ()
        self._missing: list[nn.Parameter] = []

    def is_to_make_state(self) -> bool:
        """Whether the step at hand creates state."""
        groups, state = self._optimizer.param_groups, self._optimizer.state
        # A loaded checkpoint puts another dictionary in its place; a new group adds parameters.
        seen = (id(state), len(state), *((len(g["params"]), g.get("momentum")) for g in groups))
        if seen != self._seen:
            self._seen = seen
            stateful = [g for g in groups if not (isinstance(self._optimizer, SGD) and g["momentum"] == 0)]
            self._missing = [p for group in stateful for p in group["params"] if not state.get(p)]
        return any(p.grad is not None for p in self._missing)


def _tell_scheduler(optimizer: Any) -> None:
    """A schedule goes on with every step, skipped ones too, and torch's warns if the first step of all that
    it sees is none of the optimizer's."""
    if hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        optimizer._opt_called = True


@contextmanager
def _with_verdict(optimizer: Any, decision: Decision) -> Iterator[None]:
    """Within it the optimizer has the two attributes that fused implementations look for.

    Where a scale is set they write the gradients back, which takes a seventh of their time on the CPU. Where
    the host can read it, a 1 need not be set.
    """
    scale_t: Tensor | None = decision.grad_scale_t
    if decision.is_on_host and decision.grad_scale_t.item() == 1.0:
        scale_t = None
    optimizer.found_inf, optimizer.grad_scale = decision.found_inf_t, scale_t
    try:
        yield
    finally:
        del optimizer.found_inf, optimizer.grad_scale


def _is_foreign(step: Any) -> bool:
    """Whether a wrapper around a step is not torch's own (the profiler's, a scheduler's): by where it was
    written, because `functools.wraps` lends it everything else."""
    written_in = getattr(getattr(step, "__func__", step), "__globals__", {}).get("__name__", "")
    return not written_in.startswith("torch.")


def _has_step_hooks(optimizer: Any) -> bool:
    # They run around a step that is skipped on the device too, and may change parameters.
    own = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return bool(own or _global_optimizer_pre_hooks or _global_optimizer_post_hooks)


def _scale_gradients(optimizer: Any, divisor: float) -> None:
    gradients: list[Tensor] = gradients_of([p for group in optimizer.param_groups for p in group["params"]])[
        1
    ]
    if divisor != 1.0 and gradients:
        torch._foreach_div_(gradients, divisor)


def _refuse_sharded(optimizer: Any) -> None:
    """Refuses what torch cannot do: of its fused optimizers only Adam and AdamW take DTensors."""
    if not isinstance(optimizer, Adam) and any(
        isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"][:1]
    ):
        raise ConfigError(
            f"fused {type(optimizer).__name__} over parameters sharded by FSDP2",
            rule="of torch's fused optimizers only Adam and AdamW take sharded parameters",
            remedy="use fused AdamW, or the same optimizer with fused=False",
        )
