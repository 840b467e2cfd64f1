"""Forward and backward over the micro-batches of one step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from harness.data import Batch, LossSum, Task, run_loss, to_device
from harness.dist import UnusedParameters, gradient_sync, plain
from harness.errors import ConfigError
from harness.training.faults import FaultInjector
from harness.training.precision import autocast
from harness.training.progress import Phase, Progress
from harness.training.recompute import RecomputeCheck
from harness.training.timer import StepTimer

__all__ = ["MicroBatchGuard", "StepRunner", "ignored"]


class MicroBatchGuard(Protocol):
    """What a step runner needs of a `StepGuard`, whose methods these are."""

    def accumulate(
        self,
        loss: Tensor,
        num_tokens: Tensor | float | None = None,
        *,
        num_correct: Tensor | float = 0,
        is_last: bool = False,
    ) -> None:
        """Notes a micro-batch after its backward pass."""

    def scale(self, loss: Tensor) -> Tensor:
        """What to call `backward` on."""

    def watch_forward(self) -> AbstractContextManager[None]:
        """Around a forward pass."""


def ignored(loss: LossSum) -> None:
    """Takes no note of a loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRunner:
    """Leaves in the model's gradients the gradient of the mean loss over all tokens of the global batch.

    Each micro-batch backpropagates its *sum* of losses over `nominal_tokens`, a constant; the guard corrects
    for the tokens that were really there. So the result does not depend on the split into ranks and
    micro-batches, nor on how unevenly padding is spread over them.
    """

    model: nn.Module
    task: Task
    guard: MicroBatchGuard
    faults: FaultInjector
    unused: UnusedParameters
    device: torch.device
    precision: str
    world_size: int
    progress: Progress
    timer: StepTimer
    nominal_tokens: int
    """Tokens of a global batch without padding."""
    num_passes: int
    """Forward passes of each rank in a step."""
    recompute: RecomputeCheck | None = None
    """Has steps computed twice, now and then."""
    note_loss: Callable[[LossSum], None] = ignored
    """Called with the loss of each micro-batch that counts."""

    def run(self, step: int, micro_batches: Sequence[Batch]) -> float:
        """Runs forward and backward; returns the seconds of this rank's own computing (`StepTimer`). No
        synchronisation with the device."""
        if self.recompute is not None and self.recompute.is_due(step):
            return self.recompute.twice(self, step, micro_batches)
        return self.once(step, micro_batches)

    def locally(self, step: int, batch: Batch, *, weight: float = 1.0) -> LossSum:
        """A micro-batch of which the guard hears nothing and whose gradient stays on this rank. Without DDP's
        wrapper, which would hand out buffers and then leave that out in the next step. Not under FSDP2."""
        with self.unused.completing(reduces=False):
            return self._forward_backward(plain(self.model), step, batch, weight=weight, watched=False)

    def again(self, step: int, micro_batches: Sequence[Batch]) -> None:
        """All passes of `once`, in the same order, each as `locally`."""
        for _ in range(self.num_passes - len(micro_batches)):
            self.locally(step, micro_batches[0], weight=0.0)
        for batch in micro_batches:
            self.progress.enter(Phase.FORWARD, step)
            self.locally(step, batch)

    def once(self, step: int, micro_batches: Sequence[Batch]) -> float:
        """What `run` does, whatever the step."""
        self.timer.begin()
        for _ in range(self.num_passes - len(micro_batches)):
            # Another rank has one micro-batch more, and sharded models need as many passes on each.
            with gradient_sync(self.model, on=False), self.unused.completing(reduces=False):
                self._forward_backward(self.model, step, micro_batches[0], weight=0.0)
        last = len(micro_batches) - 1
        for index, batch in enumerate(micro_batches):
            self.progress.enter(Phase.FORWARD, step)
            with (
                self.faults.armed(step, index, batch),
                gradient_sync(self.model, on=index == last),
                self.unused.completing(reduces=index == last),
            ):
                loss = self._forward_backward(self.model, step, batch)
                self.guard.accumulate(loss.total, loss.count, num_correct=loss.correct, is_last=index == last)
                self.note_loss(loss)
        return self.timer.end()

    def _forward_backward(
        self, model: nn.Module, step: int, batch: Batch, *, weight: float = 1.0, watched: bool = True
    ) -> LossSum:
        batch = to_device(batch, self.device)
        watching = self.guard.watch_forward() if watched else nullcontext()
        with autocast(self.device, self.precision), watching:
            loss = self.faults.on_loss(run_loss(self.task, model, batch))
        if not loss.total.requires_grad:
            raise ConfigError(
                "LossSum.total carries no gradient",
                rule="it is computed from the model's parameters, without detach(), item() or no_grad()",
            )
        # DDP and FSDP2 average over the ranks; the factor makes a sum of it.
        share = loss.total * (weight * self.world_size / self.nominal_tokens)
        if watched:
            self.progress.enter(Phase.BACKWARD, step)
        self.guard.scale(share).backward()
        return loss
