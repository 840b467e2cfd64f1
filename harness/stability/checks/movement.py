"""Whether every parameter gets a gradient and moves, over a window of steps; and on every rank.

Legend: W ranks, P parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from harness.config import GuardConfig
from harness.dist import local_part
from harness.records import Finding
from harness.stability.checks.base import Arrived, Check, Reading, StepView
from harness.stability.checks.cadence import FIRST_STEPS, is_window_end
from harness.stability.checks.fingerprint import sum_of_bits
from harness.stability.layout import NUM_COLUMNS, SUM_SQUARES, Layout
from harness.stability.optimizers import Optimizers
from harness.stability.rank_words import on_ranks

__all__ = ["MovementCheck"]

OWN, REDUCED, MOVED, COULD_MOVE, TRAINABLE = (1 << bit for bit in range(5))


MIN_STEPS = 9
"""Steps of a window below which it says nothing: the first one has ten."""


class MovementCheck(Check):
    """The first ten steps, then 99 at a time: parameters with no gradient, with one on some ranks only, or
    with one that moves nothing. A few small kernels a step, and one read of the parameters a window."""

    name = "movement"
    every_step = True

    def __init__(self, config: GuardConfig) -> None:
        self.every = 1 if config.silent_errors == "on" else 0
        self.every_step = self.every > 0
        self._layout: Layout | None = None
        self._has_rate: Tensor
        self._partly: Tensor | None = None
        """`[P]` bool: whose gradient was missing on some ranks in the window before."""
        self._rates_of: tuple[tuple[bool, ...], Layout, Tensor] | None = None
        """Which groups have a rate, and the flags that follow from it for a layout."""

    def attach(self, model: nn.Module, optimizers: Optimizers) -> None:
        self._optimizers = optimizers

    def forget(self) -> None:
        self._layout = self._partly = self._rates_of = None

    def is_due(self, step: int) -> bool:
        return self.every > 0 and is_window_end(step)

    def observe(self, view: StepView) -> None:
        """Notes which gradients are not zero, and whether the step before could move anything."""
        if self._layout is not view.layout:
            self._begin(view, _sums(view.layout))
        self._seen |= torch.stack([view.rows[:, SUM_SQUARES], view.rows[:, NUM_COLUMNS]], dim=1) > 0
        self._num_steps += 1
        # A step is known to be applied in the next one; the last one of a window counts for the next window.
        self._could_move |= self._has_rate & view.applied_t
        self._has_rate = self._rates(view)

    def measure(self, view: StepView) -> Tensor:
        """`[P]` int64 of flags, with the number of steps above them."""
        sums = _sums(view.layout)
        moved = (sums != self._sums).long() * MOVED
        trainable = self._flags([p.requires_grad for p in view.layout.parameters])
        flags = (
            self._seen[:, 0].long() * OWN
            + self._seen[:, 1].long() * REDUCED
            + moved
            + self._could_move.long() * COULD_MOVE
            + trainable.long() * TRAINABLE
            + self._num_steps * 2 * TRAINABLE
        )
        self._begin(view, sums)
        return flags

    def read(self, numbers: Tensor, arrived: Arrived) -> Reading:
        """Of `[W, P]`."""
        num_steps = int(numbers[0, 0]) // (2 * TRAINABLE)
        if num_steps < MIN_STEPS:
            return Reading()  # what the optimizer holds has just changed
        return Reading(findings=list(self._findings(numbers % (2 * TRAINABLE), num_steps, arrived.layout)))

    def _findings(self, flags: Tensor, num_steps: int, layout: Layout) -> Iterator[Finding]:
        def have(flag: int) -> Tensor:
            return flags & flag != 0

        trainable = have(TRAINABLE).any(0) & have(COULD_MOVE).any(0)
        own, moved = have(OWN), have(MOVED).any(0)
        dead = trainable & ~own.any(0) & ~have(REDUCED).any(0)
        if rows := _without_lone_biases(_rows(dead), layout):
            yield _finding(
                "gradient",
                f"{_listed(rows, layout)} got no gradient but zeros in {num_steps} steps",
                "look for detach(), a branch that is not called, units that are never active, or freeze it",
                layout.names[rows[0]],
            )
        if rows := _rows(trainable & ~dead & ~moved & have(REDUCED).any(0)):
            yield _finding(
                "movement",
                f"{_listed(rows, layout)} has a gradient and did not move in {num_steps} steps",
                "look at the learning rate of its group, and whether its type can hold so small a change",
                layout.names[rows[0]],
            )
        partly = trainable & own.any(0) & ~own.all(0)
        # A rank may have no sample of a rare kind for a hundred steps, and hardly for two hundred.
        before, self._partly = self._partly, partly if num_steps > FIRST_STEPS else None
        if before is None or before.shape != partly.shape:
            return
        if rows := _rows(partly & before):
            ranks = _rows(~own[:, rows[0]])
            yield _finding(
                "rank's gradient",
                f"{_listed(rows, layout)} got no gradient but zeros in {num_steps} steps"
                + on_ranks(ranks, len(flags)),
                "look at that rank's inputs: are they zeros, or does it skip a part of the model",
                layout.names[rows[0]],
                ranks[0] if len(ranks) == 1 else None,
            )

    def _begin(self, view: StepView, sums: Tensor) -> None:
        self._layout = view.layout
        self._num_steps = 0
        num, device = len(view.layout), view.rows.device
        self._sums = sums
        self._seen = torch.zeros(num, 2, dtype=torch.bool, device=device)
        self._could_move = torch.zeros(num, dtype=torch.bool, device=device)
        self._has_rate = self._rates(view)

    def _rates(self, view: StepView) -> Tensor:
        """`[P]` bool: whose learning rate is not 0; one that lies on the device is not read."""
        groups = [group for optimizer in self._optimizers.unwrapped for group in optimizer.param_groups]
        have_rate = tuple(isinstance(rate := g.get("lr", 1.0), Tensor) or rate != 0 for g in groups)
        cached = self._rates_of
        if cached is None or cached[0] != have_rate or cached[1] is not view.layout:
            positive = {
                id(p) for g, has_rate in zip(groups, have_rate, strict=True) if has_rate for p in g["params"]
            }
            flags = self._flags([id(p) in positive for p in view.layout.parameters])
            cached = self._rates_of = (have_rate, view.layout, flags)
        return cached[2]

    def _flags(self, values: list[bool]) -> Tensor:
        """On the device, without a wait."""
        host = torch.tensor(values, pin_memory=self._sums.is_cuda)
        return host.to(self._sums.device, non_blocking=True)


def _without_lone_biases(rows: list[int], layout: Layout) -> list[int]:
    """A bias alone may be without effect by design: that of a critic whose scores are compared."""
    silent = {layout.names[row] for row in rows}
    alive = {name.rpartition(".")[0] for name in layout.names if name not in silent}
    return [
        row
        for row in rows
        if layout.parameters[row].dim() > 1 or layout.names[row].rpartition(".")[0] not in alive
    ]


def _finding(check: str, problem: str, remedy: str, parameter: str, rank: int | None = None) -> Finding:
    return Finding(check=check, problem=problem, remedy=remedy, rank=rank, parameter=parameter)


def _sums(layout: Layout) -> Tensor:
    """`[P]` int64 checksums of this rank's part of each parameter."""
    return torch.stack([sum_of_bits(local_part(p)) for p in layout.parameters])


def _rows(mask: Tensor) -> list[int]:
    rows: list[int] = mask.nonzero().flatten().tolist()
    return rows


def _listed(rows: Sequence[int], layout: Layout, num: int = 3) -> str:
    more = f" and {len(rows) - num} more" if len(rows) > num else ""
    return ", ".join(layout.names[row] for row in rows[:num]) + more
