"""Whether a step starts from the very bits that the one before has left, and whether those are finite.

A flipped bit, or a stray write into parameters or optimizer state, shows in an integer checksum that is
taken after one step and before the next. What torch itself was told to write in between (`load_state_dict`,
clamped weights) shows in its version counters and is left alone.

Legend: W ranks, P parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.config import GuardConfig
from harness.dist import local_part
from harness.records import Finding
from harness.stability.checks.base import Arrived, Check, Reading, StepView
from harness.stability.checks.fingerprint import sum_of_bits
from harness.stability.layout import NUM_INF, NUM_NAN, Layout
from harness.stability.statistics import tensor_statistics

__all__ = ["StateCheck"]

PARAMETER, STATE = range(2)

NUM_CHANGED, NUM_NOT_FINITE, FIRST_NOT_FINITE, IS_FIRST_LOOK = range(4)
"""Columns of the first row that is sent."""

PLACE, DIFFERENCE, WAS_SEEN = range(3)
NUM_COLUMNS = 4
"""Columns of the rows behind it, one for each place that has changed."""

MAX_FLIPPED = 4
"""Places at once that are still a fault of memory; one that writes everywhere is a program."""

MIN_ELEMENTS = 64
"""Of a tensor whose change may be said to be memory's. A scalar that is clamped through .data, as a logit
scale is, may well change by a power of two; and few flips hit so little memory."""

PLACES = ("{}", "the optimizer state of {}")

ODD_WEIGHTS = (1, 3, 5, 7, 9)
"""Of the tensors of an optimizer's state in its sum."""

NUM_FIRST_LOOKS = 2
"""After which it is known where a loop always writes."""

_Signature = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class _Left:
    """What a step has left."""

    layout: Layout
    sums: Tensor
    """`[P, 2]` int64 of parameters and of optimizer state."""
    signatures: list[_Signature]
    is_finite: Tensor
    """`[P]` bool."""


@dataclass(frozen=True, slots=True)
class _Changed:
    """A place of a rank that was written to by nobody."""

    rank: int
    row: int
    kind: int
    """PARAMETER or STATE."""
    difference: int
    was_seen: bool
    """It has been written to so before."""

    def words(self, layout: Layout) -> str:
        return PLACES[self.kind].format(layout.names[self.row])

    def may_be_flip(self, layout: Layout) -> bool:
        """Whether the change of a sum can be one bit's: a power of two, in optimizer state times the odd
        weight of a tensor; and of a tensor that is large enough to be hit."""
        size = abs(self.difference)
        odd = size // (size & -size)
        return layout.sizes[self.row] >= MIN_ELEMENTS and odd in (ODD_WEIGHTS if self.kind == STATE else (1,))


class StateCheck(Check):
    """Every `guard.state_every` steps; measured in the step after."""

    name = "state"
    delay = 1
    every_step = True

    def __init__(self, config: GuardConfig) -> None:
        self.every = config.state_every if config.silent_errors == "on" else 0
        self.every_step = self.every > 0
        self._left: _Left | None = None
        self._num_looks = 0
        self._seen: Tensor | None = None
        """`[2 P]` bool on the device: where writes were seen that torch has not counted."""
        self._by_design: Tensor | None = None
        """Of these, at the first looks: a loop that always writes there through .data."""

    def after_update(self, view: StepView) -> None:
        """Keeps checksums of what a step that is due has left."""
        if not self.is_due(view.step):
            return
        tensors = [_tensors(p, view) for p in view.layout.parameters]
        finite = _are_finite(view.layout.parameters)
        self._left = _Left(view.layout, _sums(tensors), [_signature(one) for one in tensors], finite)

    def measure(self, view: StepView) -> Tensor | None:
        """`[1 + MAX_FLIPPED, NUM_COLUMNS]` int64, whatever the number of parameters: how many places have
        changed and were written to by nobody, how many parameters are not finite and which is the first; then
        the first `MAX_FLIPPED` of these places, by how much their sums have changed, and whether that is new.
        A place is the parameter's row, twice, plus PARAMETER or STATE, plus 1; 0: none."""
        left, self._left = self._left, None
        if left is None or left.layout is not view.layout:
            return view.rows.new_zeros(1 + MAX_FLIPPED, NUM_COLUMNS, dtype=torch.int64)
        tensors = [_tensors(p, view) for p in view.layout.parameters]
        pairs = zip(tensors, left.signatures, strict=True)
        unwritten = torch.tensor(
            [_signature(one) == before for one, before in pairs], pin_memory=left.sums.is_cuda
        )
        difference = _sums(tensors) - left.sums
        changed = (difference != 0) & unwritten.to(difference.device, non_blocking=True)[:, None]
        return self._summary(difference.flatten(), changed.flatten(), left.is_finite)

    def read(self, numbers: Tensor, arrived: Arrived) -> Reading:
        """Of `[W, 1 + MAX_FLIPPED, NUM_COLUMNS]`."""
        totals, places = numbers[:, 0], numbers[:, 1:].tolist()
        num_changed = int(totals[:, NUM_CHANGED].sum())
        changed = [
            _Changed(rank, (place - 1) // 2, (place - 1) % 2, difference, bool(was_seen))
            for rank, rows in enumerate(places)
            for place, difference, was_seen, _ in rows
            if place
        ]
        is_new = not any(one.was_seen for one in changed)
        can_be_flips = all(one.may_be_flip(arrived.layout) for one in changed)
        if 0 < num_changed <= MAX_FLIPPED and is_new and can_be_flips:
            where = [f"{one.words(arrived.layout)} on rank {one.rank}" for one in changed]
            return Reading(
                reason=f"a bit was flipped between two steps in {', '.join(where)}: faulty memory",
                rank=changed[0].rank,
                parameter=arrived.layout.names[changed[0].row],
            )
        if bool(totals[:, NUM_NOT_FINITE].any()):
            return self._not_finite(totals, arrived)
        may_be_by_design = bool(totals[:, IS_FIRST_LOOK].any())
        return self._written(changed[0], arrived) if changed and not may_be_by_design else Reading()

    def forget(self) -> None:
        self._left = None

    def _summary(self, difference: Tensor, changed: Tensor, is_finite: Tensor) -> Tensor:
        """What is sent of the changes of `2 P` sums, without what the loop writes by design."""
        if self._seen is None or self._seen.shape != changed.shape or self._by_design is None:
            self._seen, self._by_design = torch.zeros_like(changed), torch.zeros_like(changed)
        changed = changed & ~self._by_design
        places = _first(changed)
        index = (places - 1).clamp(min=0)
        rows = torch.stack([places, difference[index], self._seen[index].long()]) * (places > 0)
        self._seen = self._seen | changed
        self._num_looks += 1
        is_first = self._num_looks <= NUM_FIRST_LOOKS
        if is_first:
            self._by_design = self._seen
        broken = ~is_finite
        totals = torch.stack([changed.sum(), broken.sum(), broken.long().argmax()])
        table = nn.functional.pad(torch.cat([totals[None], rows.T]), (0, 1))
        table[0, IS_FIRST_LOOK] = int(is_first)
        return table

    def _not_finite(self, totals: Tensor, arrived: Arrived) -> Reading:
        rank = int(totals[:, NUM_NOT_FINITE].nonzero()[0])
        name = arrived.layout.names[int(totals[rank, FIRST_NOT_FINITE])]
        finding = Finding(
            check=self.name,
            problem=f"{name} is not finite on rank {rank}: the optimizer's step made it so",
            remedy="look at the optimizer's eps and learning rate, and go back to a checkpoint",
            rank=rank,
            parameter=name,
        )
        return Reading(findings=[finding])

    def _written(self, one: _Changed, arrived: Arrived) -> Reading:
        finding = Finding(
            check=self.name,
            problem=f"{one.words(arrived.layout)} was changed on rank {one.rank} between two steps by a "
            "write that torch has not counted",
            remedy="look for writes through .data, views in C or NumPy, an optimizer.step() in the loop; if "
            "nothing writes, for faulty memory",
            rank=one.rank,
            parameter=arrived.layout.names[one.row],
        )
        return Reading(findings=[finding])


def _first(mask: Tensor) -> Tensor:
    """`[MAX_FLIPPED]` int64: the numbers, from 1 on, of the first places that are set; 0 for those missing.
    Without asking how many there are, which would synchronise."""
    num = len(mask)
    ranked = mask.long() * torch.arange(num, 0, -1, device=mask.device)
    top = ranked.topk(min(MAX_FLIPPED, num)).values
    found = torch.where(top > 0, num + 1 - top, 0)
    return nn.functional.pad(found, (0, MAX_FLIPPED - len(found)))


def _tensors(parameter: nn.Parameter, view: StepView) -> list[Tensor]:
    """The parameter, and what the optimizer remembers of it."""
    state: list[tuple[str, Any]] = sorted(view.state_of(parameter).items())
    return [parameter, *(value for _, value in state if isinstance(value, Tensor))]


def _sums(tensors: list[list[Tensor]]) -> Tensor:
    """`[P, 2]` of parameters and their states."""
    rows = []
    for parameter, *state in tensors:
        device = parameter.device
        total = torch.zeros((), dtype=torch.int64, device=device)
        for place, one in enumerate(state):
            # Odd weights, so that opposite changes in two tensors do not cancel.
            total += (2 * place + 1) * sum_of_bits(one).to(device, non_blocking=True)
        rows.append(torch.stack([sum_of_bits(parameter), total]))
    return torch.stack(rows)


def _signature(tensors: list[Tensor]) -> _Signature:
    return tuple((id(one), local_part(one)._version) for one in tensors)


def _are_finite(parameters: Sequence[nn.Parameter]) -> Tensor:
    """`[P]` bool."""
    rows = tensor_statistics([local_part(parameter).detach() for parameter in parameters], extremes=False)
    return rows[:, NUM_NAN] + rows[:, NUM_INF] == 0
