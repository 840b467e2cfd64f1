"""Whether a step starts from the very bits that the one before has left, and whether those are finite.

A flipped bit, or a stray write into parameters or optimizer state, shows in an integer checksum that is
taken after one step and before the next. What torch itself was told to write in between (`load_state_dict`,
clamped weights) shows in its version counters and is left alone.

Legend: W ranks, P parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
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

PARAMETER, STATE, UNWRITTEN, NOT_FINITE = range(4)

MAX_FLIPPED = 4
"""Places at once that are still a fault of memory; one that writes everywhere is a program."""

MIN_ELEMENTS = 64
"""Of a tensor whose change may be said to be memory's. A scalar that is clamped through .data, as a logit
scale is, may well change by a power of two; and few flips hit so little memory."""

PLACES = ((PARAMETER, "{}"), (STATE, "the optimizer state of {}"))

ODD_WEIGHTS = (1, 3, 5, 7, 9)
"""Of the tensors of an optimizer's state in its sum."""

_Signature = tuple[tuple[int, int], ...]
_Place = tuple[int, int, int]
"""Rank, row and column of what changed."""


class StateCheck(Check):
    """Every `guard.state_every` steps; measured in the step after."""

    name = "state"
    delay = 1
    every_step = True

    def __init__(self, config: GuardConfig) -> None:
        self.every = config.state_every if config.silent_errors == "on" else 0
        self.every_step = self.every > 0
        self._left: tuple[Layout, Tensor, list[_Signature], Tensor] | None = None
        self._num_looks = 0
        self._seen: set[_Place] = set()
        """Where writes were seen that torch has not counted."""
        self._by_design: set[_Place] = set()
        """Of these, at the first looks: a loop that always writes there through .data."""

    def after_update(self, view: StepView) -> None:
        """Keeps checksums of what a step that is due has left."""
        if not self.is_due(view.step):
            return
        tensors = [_tensors(p, view) for p in view.layout.parameters]
        finite = _are_finite(view.layout.parameters)
        self._left = (view.layout, _sums(tensors), [_signature(one) for one in tensors], finite)

    def measure(self, view: StepView) -> Tensor | None:
        """`[P, 4]` int64: by how much the sums of parameter and state have changed, whether nobody was seen
        to write, and whether the parameter is not finite."""
        left, self._left = self._left, None
        if left is None or left[0] is not view.layout:
            return torch.zeros(len(view.layout), 4, dtype=torch.int64, device=view.rows.device)
        _, sums, signatures, finite = left
        tensors = [_tensors(p, view) for p in view.layout.parameters]
        unwritten = [_signature(one) == before for one, before in zip(tensors, signatures, strict=True)]
        host = torch.tensor(unwritten, pin_memory=sums.is_cuda)
        flags = [host.to(sums.device, non_blocking=True).long(), (~finite).long()]
        return torch.cat([_sums(tensors) - sums, torch.stack(flags, dim=1)], dim=1)

    def read(self, numbers: Tensor, arrived: Arrived) -> Reading:
        """Of `[W, P, 4]`."""
        changed = (numbers[:, :, :UNWRITTEN] != 0) & (numbers[:, :, UNWRITTEN, None] != 0)
        self._num_looks += 1
        where: list[list[int]] = changed.nonzero().tolist()
        is_new = not any(tuple(at) in self._seen for at in where)
        self._seen |= {(rank, row, column) for rank, row, column in where}
        if 0 < len(where) <= MAX_FLIPPED and is_new and all(_is_flip(at, numbers, arrived) for at in where):
            names = arrived.layout.names
            places = [f"{PLACES[column][1].format(names[row])} on rank {r}" for r, row, column in where]
            rank, row, _ = where[0]
            return Reading(
                reason=f"a bit was flipped between two steps in {', '.join(places)}: faulty memory",
                rank=rank,
                parameter=names[row],
            )
        if bool(numbers[:, :, NOT_FINITE].any()):
            return self._not_finite(numbers, arrived)
        if self._num_looks <= 2:
            self._by_design |= self._seen
        where = [at for at in where if tuple(at) not in self._by_design]
        return self._written(where, arrived) if where else Reading()

    def forget(self) -> None:
        self._left = None

    def _not_finite(self, numbers: Tensor, arrived: Arrived) -> Reading:
        rank, row = numbers[:, :, NOT_FINITE].nonzero()[0].tolist()
        name = arrived.layout.names[row]
        finding = Finding(
            check=self.name,
            problem=f"{name} is not finite on rank {rank}: the optimizer's step made it so",
            remedy="look at the optimizer's eps and learning rate, and go back to a checkpoint",
            rank=rank,
            parameter=name,
        )
        return Reading(findings=[finding])

    def _written(self, where: list[list[int]], arrived: Arrived) -> Reading:
        rank, row, column = where[0]
        name = arrived.layout.names[row]
        finding = Finding(
            check=self.name,
            problem=f"{PLACES[column][1].format(name)} was changed on rank {rank} between two steps by a "
            "write that torch has not counted",
            remedy="look for writes through .data, views in C or NumPy, an optimizer.step() in the loop; if "
            "nothing writes, for faulty memory",
            rank=rank,
            parameter=name,
        )
        return Reading(findings=[finding])


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


def _is_flip(at: list[int], numbers: Tensor, arrived: Arrived) -> bool:
    """Whether the change of a sum can be one bit's: a power of two, in optimizer state times the odd weight
    of a tensor; and of a tensor that is large enough to be hit."""
    _, row, column = at
    size = abs(int(numbers[tuple(at)]))
    odd = size // (size & -size)
    return arrived.layout.sizes[row] >= MIN_ELEMENTS and odd in (ODD_WEIGHTS if column == STATE else (1,))
