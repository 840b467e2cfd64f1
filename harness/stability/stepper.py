"""Steps the optimizers as decided, on the device where they can, and takes back what is not finite then."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, Muon, NAdam, RAdam, RMSprop, Rprop
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from harness.config import GuardConfig
from harness.dist import ShardedMuon
from harness.dist.collectives import all_gather
from harness.errors import ConfigError
from harness.stability.before import (
    UPDATE,
    Before,
    is_undone,
    not_finite,
    share_bytes,
    step_selected,
)
from harness.stability.fused_check import FusedCheck
from harness.stability.layout import Layout
from harness.stability.optimizers import Optimizers
from harness.stability.packing import Packet
from harness.stability.sources import gradients_of
from harness.stability.triton_adamw import TritonAdamW
from harness.stability.verdict import Decision

__all__ = ["OptimizerStepper"]

HONOURING = {inspect.unwrap(kind.step) for kind in (Adam, SGD, Adagrad, TritonAdamW)}
"""Step functions that, fused, honour `found_inf` and `grad_scale` (torch 2.13). AdamW's is Adam's."""

HONOURING_DEVICES = {"cpu", "cuda"}
"""On MPS fused Adam ignored both (pytorch #186360)."""

SELECTED = {inspect.unwrap(kind.step) for kind in (SGD, Muon, ShardedMuon)}
"""Step functions that, unfused, keep nothing on the host and write their state in place."""

CAPTURABLE = {
    inspect.unwrap(kind.step) for kind in (Adam, NAdam, RAdam, Adamax, ASGD, Adadelta, RMSprop, Rprop)
}
"""The same, where `capturable` is set: their step counts are on the device then."""

MAX_SELECTED_BYTES = 1 << 30
"""Of a rank's parameters, and as much state, up to which copying and selecting, some seven passes, is taken
for cheaper than a wait for the device and the launches that it no longer hides: 2 ms at 4 TB/s. An estimate,
not measured."""

Way = Literal["device", "select", "host"]
"""How an optimizer gets the verdict: it reads it, its step is selected or taken back, the host reads it."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """How an optimizer goes through a step."""

    optimizer: Any
    way: Way
    is_fused: bool
    undoes: bool
    """Whether its step is taken back if it leaves anything not finite."""


class OptimizerStepper:
    """Steps optimizers by decisions.

    Fused Adam, AdamW, SGD and Adagrad read `found_inf` and `grad_scale` on the device and leave parameters
    and state alone, or divide the gradients, in the one pass that they make anyway. Only torch's own step
    functions are trusted with that, without hooks on the step, and they are checked until they have proven
    it (`FusedCheck`). The unfused ones that keep nothing on the host (SGD, Muon, others if `capturable`) are
    stepped in any case on a device, and the verdict selects between what was and what is. Any other optimizer
    is called only for steps that are applied, with gradients that are clipped already; that costs a
    synchronisation per step and, when it clips, a pass over the gradients. So does a step in which an
    optimizer creates state: fused SGD leaves momentum uninitialised in a step that it skips. How an optimizer
    is set up is read anew in every step.

    `undo` says whose updates are taken back if they leave anything not finite: Muon's (auto), of all, or of
    none. They are stepped first, so that the others are told. All ranks ask one another, so all take the step
    back or none. Muon over shards has collectives in its step, so all that is asked of it are its class and
    parameters, which are equal on all ranks; its hooks run in steps that are left out on a device too.

    Args:
        group: The ranks that train together; None: this one alone.

    Raises:
        ConfigError: an optimizer is one that torch cannot run on sharded parameters.
    """

    def __init__(
        self,
        optimizers: Optimizers,
        config: GuardConfig,
        *,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._optimizers, self._group = optimizers, group
        self._undo, self._nonfinite = config.undo, config.nonfinite
        self.fused_check = FusedCheck(device)
        self._warned_of: set[str] = set()
        self._has_told_size = self._undo != "always"
        self.reset()
        for optimizer in optimizers.unwrapped:
            if not self._is_fused(optimizer) and self._unfused_way(optimizer) == "host":
                self._warn_once(optimizer)

    def reset(self) -> None:
        """Forgets which parameters have optimizer state, because the optimizers hold others now."""
        self._stateless = {id(optimizer): _Stateless(optimizer) for optimizer in self._optimizers.unwrapped}
        self._share_bytes = {
            id(optimizer): share_bytes(optimizer) for optimizer in self._optimizers.unwrapped
        }

    def step(self, step: int, decision: Decision, layout: Layout) -> tuple[Decision, Packet]:
        """Steps the optimizers, or not. Synchronises only where the class says so.

        Returns:
            What became of the step: the decision, or that it was taken back; and `UPDATE`, where the ranks
            asked one another.
        """
        for optimizer in (*self._optimizers.wrapped, *self._optimizers.unwrapped):
            _tell_scheduler(optimizer)
        plans = [self._plan(optimizer, decision) for optimizer in self._optimizers.unwrapped]
        kept, rest = [one for one in plans if one.undoes], [one for one in plans if not one.undoes]
        packet: Packet = {}
        # First those that may be taken back: fused ones then read in `found_inf` what became of them.
        if kept:
            before = self._copied(kept)
            self._step_each(step, kept, decision, is_last=not rest)
            decision, packet = self._undo_not_finite(kept, before, decision, layout)
        if rest:
            self._step_each(step, rest, decision, is_last=True)
        return decision, packet

    def _plan(self, optimizer: Any, decision: Decision) -> _Plan:
        """How an optimizer goes through the step at hand."""
        is_fused = self._is_fused(optimizer)
        way = "device" if is_fused else self._unfused_way(optimizer)
        if way == "host":
            self._warn_once(optimizer)
        elif way == "select" and decision.is_on_host:
            way = "host"  # the decision is there already: reading it costs nothing, selecting a copy
        if self._stateless[id(optimizer)].is_to_make_state():
            way = "host"
        # Where the host reads it for nothing, on all ranks then, a step that is left out needs no copy.
        is_left_out = decision.is_on_host and bool(decision.skip_t)
        undoes = is_undone(optimizer, self._undo) and not is_left_out
        return _Plan(optimizer=optimizer, way=way, is_fused=is_fused, undoes=undoes)

    def _copied(self, plans: Sequence[_Plan]) -> list[Before]:
        """What they find, and once how much that is."""
        try:
            before = [Before(one.optimizer) for one in plans]
        except (torch.OutOfMemoryError, NotImplementedError) as error:
            names = ", ".join(type(one.optimizer).__name__ for one in plans)
            raise ConfigError(
                f"what {names} may change cannot be copied: {error}",
                rule=f"guard.undo is {self._undo}: while they step, weights and state are held twice",
                remedy="--guard.undo never",
            ) from error
        if not (self._has_told_size or any(self._stateless[id(one.optimizer)].makes_state for one in plans)):
            self._has_told_size = True
            num_gib = sum(one.size_bytes for one in before) / 2**30
            logger.warning("guard.undo is always: %.3g GiB are copied in each step", num_gib)
        return before

    def _step_each(self, step: int, plans: Sequence[_Plan], decision: Decision, *, is_last: bool) -> None:
        by_device = [one.optimizer for one in plans if one.way == "device"]
        skip, divisor = False, 1.0
        if any(one.way == "host" for one in plans):
            skip, divisor = torch.stack([decision.found_inf_t, decision.grad_scale_t]).tolist()
        with self.fused_check.checking(step, by_device, decision) if is_last else nullcontext():
            for one in plans:
                if one.way == "select":
                    _scale_gradients(one.optimizer, decision.grad_scale_t)
                    if one.undoes:  # all of it has been copied, and is selected once the ranks have spoken
                        one.optimizer.step()
                    else:
                        step_selected(one.optimizer, decision.skip_t)
                elif one.way == "device" or (one.is_fused and not skip):
                    with _with_verdict(one.optimizer, decision):
                        one.optimizer.step()
                elif not skip:
                    _scale_gradients(one.optimizer, divisor)
                    one.optimizer.step()

    def _undo_not_finite(
        self, plans: Sequence[_Plan], before: Sequence[Before], decision: Decision, layout: Layout
    ) -> tuple[Decision, Packet]:
        """Takes the step back on all ranks if it left anything not finite on one of them."""
        here = not_finite(before, layout)
        # A step that is skipped may have been made all the same, and is taken back whatever it has left.
        here = torch.where(decision.skip_t, torch.zeros_like(here), here)
        of_ranks = all_gather(here, group=self._group)
        decision = decision.taken_back(of_ranks[:, 0].sum() > 0, stops=self._nonfinite == "stop")
        # Another read costs nothing where this step has waited for the device anyway; else nobody reads it.
        is_read = decision.is_on_host or any(plan.way == "host" for plan in plans)
        is_skip = is_read and bool(decision.skip_t)
        for plan, one in zip(plans, before, strict=True):
            if plan.way != "host" and not decision.is_on_host:
                one.select(decision.skip_t)
            elif is_skip:
                one.put_back()
        return decision, {UPDATE: of_ranks}

    def _unfused_way(self, optimizer: Any) -> Way:
        """How an optimizer that reads no verdict gets it on a device, once it has its state."""
        is_muon = isinstance(optimizer, Muon)
        step = _step_function(type(optimizer) if is_muon else optimizer)
        is_capturable = step in CAPTURABLE and all(g.get("capturable") for g in optimizer.param_groups)
        if not (step in SELECTED or is_capturable) or (not is_muon and _has_step_hooks(optimizer)):
            return "host"
        is_small = self._share_bytes[id(optimizer)] <= MAX_SELECTED_BYTES
        is_cheaper = is_small or is_undone(optimizer, self._undo)
        return "select" if is_cheaper else "host"

    def _is_fused(self, optimizer: Any) -> bool:
        """Whether it takes the verdict on the device."""
        if not all(group.get("fused") for group in optimizer.param_groups):
            return False
        devices = {p.device.type for group in optimizer.param_groups for p in group["params"][:1]}
        honours = _step_function(optimizer) in HONOURING and devices <= HONOURING_DEVICES
        if honours and not _has_step_hooks(optimizer):
            _refuse_sharded(optimizer)
            return True
        return False

    def _warn_once(self, optimizer: Any) -> None:
        name = type(optimizer).__name__
        if name not in self._warned_of:
            self._warned_of.add(name)
            logger.warning(
                "%s reads the guard's verdict on the host, one synchronisation per step; torch's own Adam, "
                "AdamW, SGD and Adagrad with fused=True, SGD and Muon as they are, and its others with "
                "capturable=True avoid it, without step hooks",
                name,
            )


class _Stateless:
    """Which of an optimizer's parameters have no optimizer state yet."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._seen: tuple[object, ...] = ()
        self._missing: list[nn.Parameter] = []
        self.makes_state = False
        """What `is_to_make_state` has said last."""

    def is_to_make_state(self) -> bool:
        """Whether the step at hand creates state."""
        groups, state = self._optimizer.param_groups, self._optimizer.state
        # A loaded checkpoint puts another dictionary in its place; a new group adds parameters.
        seen = (id(state), len(state), *((len(g["params"]), g.get("momentum")) for g in groups))
        if seen != self._seen:
            self._seen = seen
            stateful = [g for g in groups if not (isinstance(self._optimizer, SGD) and g["momentum"] == 0)]
            self._missing = [p for group in stateful for p in group["params"] if not state.get(p)]
        self.makes_state = any(p.grad is not None for p in self._missing)
        return self.makes_state


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


def _step_function(optimizer: Any) -> Any:
    """Its step without torch's wrappers around it."""
    step = inspect.unwrap(optimizer.step, stop=_is_foreign)
    return getattr(step, "__func__", step)


def _is_foreign(step: Any) -> bool:
    """Whether a wrapper around a step is not torch's own (the profiler's, a scheduler's): by where it was
    written, because `functools.wraps` lends it everything else."""
    written_in = getattr(getattr(step, "__func__", step), "__globals__", {}).get("__name__", "")
    return not written_in.startswith("torch.")


def _has_step_hooks(optimizer: Any) -> bool:
    # They run around a step that is skipped on the device too, and may change parameters.
    own = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return bool(own or _global_optimizer_pre_hooks or _global_optimizer_post_hooks)


def _scale_gradients(optimizer: Any, divisor: float | Tensor) -> None:
    gradients: list[Tensor] = gradients_of([p for group in optimizer.param_groups for p in group["params"]])[
        1
    ]
    if gradients and (isinstance(divisor, Tensor) or divisor != 1.0):
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
