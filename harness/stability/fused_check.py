"""Checks that a fused optimizer does what the device tells it: not to step, and to divide the gradients.

A record must not say `skip` or `clip` over weights that changed all the same. Whether it does is seen on a
few elements of a few parameters, without a read on the host, and all ranks hear of it in the next step's
message.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from harness.dist import local_part
from harness.stability.rank_statistics import Fault
from harness.stability.verdict import Decision

__all__ = ["FusedCheck"]

NUM_PARAMETERS = 4
NUM_ELEMENTS = 32
"""How many parameters of an optimizer, and elements of each, are looked at."""

NOTICEABLE = 1.05
"""Divisor from which an untouched gradient means that it was not divided."""


class FusedCheck:
    """Checks fused optimizers until each instruction was followed once.

    Some twenty small kernels in a step that is checked. Nothing here synchronises.
    """

    def __init__(self, device: torch.device) -> None:
        self.faults_t = torch.zeros((), dtype=torch.float64, device=device)
        """`Fault.IGNORED_SKIP` and `Fault.IGNORED_CLIP` as far as they have been seen, for good."""
        self._checked_from: int | None = None
        self._unproven = {"skip", "clip"}

    @contextmanager
    def checking(self, step: int, optimizers: Sequence[Any], decision: Decision) -> Iterator[None]:
        """Put the step of `optimizers`, all of which take the verdict on the device, into it."""
        chosen = (
            [p for optimizer in optimizers for p in _some_parameters(optimizer)] if self._unproven else []
        )
        if not chosen:
            self._checked_from = None
            yield
            return
        if self._checked_from is None:
            self._checked_from = step
        if not self._may_show(decision):
            yield
            return
        written = [optimizer for optimizer in optimizers if not getattr(optimizer, "leaves_gradients", False)]
        gradients = [p.grad for one in written for p in _some_parameters(one) if p.grad is not None]
        values_before, gradients_before = _some(chosen), _some(gradients)
        yield
        moved = (_bits(_some(chosen)) != _bits(values_before)).any()
        undivided = (_some(gradients) == gradients_before).all() & gradients_before.any()
        ignored_skip = decision.skip_t & moved
        ignored_clip = ~decision.skip_t & (decision.grad_scale_t > NOTICEABLE) & undivided
        seen = ignored_skip * Fault.IGNORED_SKIP + ignored_clip * Fault.IGNORED_CLIP
        torch.maximum(self.faults_t, seen.double(), out=self.faults_t)

    def _may_show(self, decision: Decision) -> bool:
        """Whether the step has an instruction that was not followed yet; where that cannot be read, every
        step may."""
        if not decision.is_on_host:
            return True
        if decision.skip_t.item():
            return "skip" in self._unproven
        return "clip" in self._unproven and decision.grad_scale_t.item() > NOTICEABLE

    def observe(self, step: int, *, skipped: bool, clip_coef: float) -> None:
        """Takes what became of the steps, in order; what was checked and followed is not checked again."""
        if self._checked_from is None or step < self._checked_from:
            return
        if skipped:
            self._unproven.discard("skip")
        elif clip_coef < 1 / NOTICEABLE:
            self._unproven.discard("clip")


def _some_parameters(optimizer: Any) -> list[nn.Parameter]:
    """Those to be looked at: evenly spaced among the ones that have a gradient."""
    having = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return having[:: max(1, len(having) // NUM_PARAMETERS)][:NUM_PARAMETERS]


def _some(tensors: Sequence[Tensor]) -> Tensor:
    """Some elements of this rank's shares, `[n]` float64."""
    shares = [local_part(tensor).detach() for tensor in tensors]
    return torch.cat([_head(share) for share in shares]).double() if shares else torch.zeros(0)


def _bits(values: Tensor) -> Tensor:
    """Float64 as int64: so a NaN that stays is no change."""
    return values.view(torch.int64)


def _head(tensor: Tensor) -> Tensor:
    return (tensor if tensor.is_contiguous() else tensor[:1]).reshape(-1)[:NUM_ELEMENTS]
