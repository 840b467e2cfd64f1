"""What every check is: measured on the device, sent with the step's one gather, read on the host.

Legend: W ranks = R replicas x S shards, P parameters.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from harness.records import Finding
from harness.stability.layout import Layout
from harness.stability.optimizers import Optimizers, StateOf

__all__ = ["Arrived", "Check", "Reading", "StepView"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepView:
    """A step as a check sees it, between the backward pass and the verdict."""

    step: int
    layout: Layout
    """The parameters and their names."""
    rows: Tensor
    """`[P, 6]` float64 on the device: this rank's statistics of each gradient (the columns of `layout`), and
    the sum of squares of what the optimizer will use here."""
    state_of: StateOf
    """Gives the optimizer's state of a parameter."""
    precision: torch.dtype
    """Of the arithmetic of forward and backward."""
    num_replicas: int
    applied_t: Tensor
    """0-d bool: whether the step before was applied; False before the first."""
    counts_tokens: bool
    """Whether the loop tells how many tokens its losses are of, and the guard divides by them."""
    loss_scale_t: Tensor
    """0-d fp32, with which the backward pass was made; 1 without loss scaling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrived:
    """What a check may need to read its numbers, on the host and some steps later."""

    step: int
    layout: Layout
    """Of the step that was measured."""
    num_replicas: int
    divisor: float
    """What gradients and their norms have to be divided by: loss scale and number of tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a check has found."""

    values: Mapping[str, float] = field(default_factory=dict)
    """Numbers under the names that log and mirrors show, such as `mine/largest`."""
    reason: str | None = None
    """What is wrong with the step, in words; it makes the step an incident."""
    rank: int | None = None
    """Who is to blame for that, if somebody is; and in which parameter."""
    parameter: str | None = None
    findings: Sequence[Finding] = ()
    """What is wrong with the loop and not with this step: said once, and no incident."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the `StepRecord` that the check fills: the bundled ones have theirs there."""


class Check(abc.ABC):
    """A measurement that is made every `every` steps, at the same steps on all ranks.

    What it measures travels in the step's one gather and its one copy to the host, so a step in which nothing
    is due costs nothing. Nothing in it but `read` may look at a value: that would make the host wait for the
    device.
    """

    name: str
    """Of the tensor in the packet; no two checks have the same."""
    every: int
    """Steps between measurements; 0: never."""
    delay: ClassVar[int] = 0
    """Steps from where it is due to where it is measured: 1 for what the update does, which shows in the next
    step."""
    same_on_replicas: ClassVar[bool] = False
    """All replicas measure the same: one replica's shards are enough, and are all that `read` gets."""

    every_step: bool = False
    """Whether `observe` and `after_update` are to be called in every step."""

    def attach(self, model: nn.Module, optimizers: Optimizers) -> None:
        """Once, when the guard is made, before its first step."""
        return

    def is_due(self, step: int) -> bool:
        """Whether `step` is one of its steps."""
        return self.every > 0 and step % self.every == 0

    def is_measured(self, step: int) -> bool:
        """Whether its numbers travel with `step`."""
        return step >= self.delay and self.is_due(step - self.delay)

    def watch_forward(self) -> AbstractContextManager[object]:
        """Around the forward passes of a step that is due, where the loop uses `StepGuard.watch_forward`."""
        return nullcontext()

    def observe(self, view: StepView) -> None:
        """In every step, with the gradients in the model and before the verdict, if `every_step`."""
        return

    def before_update(self, view: StepView) -> None:
        """Just before the optimizer's step of a step that is due, which may yet be left out."""
        return

    def after_update(self, view: StepView) -> None:
        """In every step, once the optimizer has been stepped, or not; if `every_step`."""
        return

    @abc.abstractmethod
    def measure(self, view: StepView) -> Tensor | None:
        """This rank's numbers, float or integer, on the device; None: nothing this time. On every rank alike,
        and of the same shape."""

    @abc.abstractmethod
    def read(self, numbers: Tensor, arrived: Arrived) -> Reading:
        """What they mean.

        Args:
            numbers: `[W, ...]` float64 or int64 on the host: what `measure` gave on each rank; `[S, ...]`
                with `same_on_replicas`.
        """

    def unseen(self, view: StepView) -> Sequence[str]:
        """What it cannot see in this loop, and why, in words; asked once, after the first steps."""
        return ()

    def forget(self) -> None:
        """Drops what is kept of steps under way: the run goes on from another state."""
        return

    def close(self) -> None:
        """The guard is closed: takes out what was hung on the model."""
        return
