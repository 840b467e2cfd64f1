"""A step computed twice: the same numbers have to give the same bits, or something computes wrongly.

Legend: W ranks, P parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from harness.checkpoint import Rng
from harness.data import Batch
from harness.dist import hands_out_buffers, plain
from harness.stability.checks.base import Arrived, Check, Reading, StepView
from harness.stability.checks.fingerprint import fingerprint, sum_of_bits
from harness.training.buffers import SavedBuffers

__all__ = ["RecomputeCheck", "Runner", "aside"]


class Runner(Protocol):
    """What a `StepRunner` can do twice."""

    @property
    def model(self) -> nn.Module:
        """With DDP around it, if there is one."""

    def once(self, step: int, micro_batches: Sequence[Batch]) -> float:
        """Forward and backward passes of a step; the seconds of this rank's own computing."""

    def again(self, step: int, micro_batches: Sequence[Batch]) -> None:
        """The same passes, with gradients that stay on this rank."""


class RecomputeCheck(Check):
    """Every `every` steps forward and backward passes are made a second time, from the same weights, buffers
    and random numbers. Each rank compares the gradients that it gets before they are reduced.

    Not for sharded models, whose gradients are reduced as they come. The second pass costs a step's time;
    nothing of it is left.
    """

    name = "recompute"

    def __init__(self, every: int) -> None:
        self.every = every
        self._differs: Tensor | None = None

    def twice(self, runner: Runner, step: int, micro_batches: Sequence[Batch]) -> float:
        """What `runner.run` does, and then again; returns the seconds of the first time."""
        model = plain(runner.model)
        rng, buffers = Rng().state_dict(), SavedBuffers(model)
        if hands_out_buffers(runner.model):
            buffers.take_from_main()
        with _noting(model) as first:
            compute_s = runner.once(step, micro_batches)
        with aside(model), _noting(model) as second:
            Rng().load_state_dict(rng)
            buffers.put_back()
            runner.again(step, micro_batches)
        self._differs = torch.stack([(a != b).any() for a, b in zip(first, second, strict=True)]).long()
        return compute_s

    def measure(self, view: StepView) -> Tensor | None:
        """`[P]`: 1 where the gradient of a parameter was another one the second time."""
        differs, self._differs = self._differs, None
        return differs

    def read(self, numbers: Tensor, arrived: Arrived) -> Reading:
        """Of `[W, P]`."""
        ranks, rows = numbers.nonzero(as_tuple=True)
        if not len(ranks):
            return Reading()
        rank, row = int(ranks[0]), int(rows[0])
        name = arrived.layout.names[row]
        who = ", ".join(str(one) for one in sorted(set(ranks.tolist())))
        count = int((ranks == rank).sum())
        return Reading(
            reason=f"computed twice, rank {who} does not get the same gradient of {name} ({count} parameters"
            " in all): hardware, or a kernel that is not deterministic",
            rank=rank,
            parameter=name,
        )

    def forget(self) -> None:
        self._differs = None


@contextmanager
def aside(model: nn.Module) -> Iterator[SavedBuffers]:
    """Within it gradients are none; afterwards generators, gradients and buffers are what they were. Gives
    the buffers as they are before."""
    rng, buffers = Rng().state_dict(), SavedBuffers(model)
    parameters = list(model.parameters())
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield buffers
    finally:
        Rng().load_state_dict(rng)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        buffers.put_back()


@contextmanager
def _noting(model: nn.Module) -> Iterator[list[Tensor]]:
    """The checksums of each parameter's gradient as this rank has added it up, `[2]` each; there once the
    context is left."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sums = [torch.zeros(2, dtype=torch.int64, device=parameter.device) for parameter in parameters]
    place = {id(parameter): row for row, parameter in enumerate(parameters)}

    def note(parameter: Tensor) -> None:
        if parameter.grad is not None:
            gradient = parameter.grad
            # The second one sees elements that have changed places.
            sums[place[id(parameter)]] = torch.stack([sum_of_bits(gradient), fingerprint(gradient)])

    handles = [parameter.register_post_accumulate_grad_hook(note) for parameter in parameters]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
