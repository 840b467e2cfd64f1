"""Where gradients are measured: in a model of one process here, under DDP and FSDP2 in modules of their own.

Legend: P parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness.dist import local_part
from harness.stability.backward import BackwardStatistics
from harness.stability.layout import MAX_ABS, NUM_COLUMNS, NUM_ZERO, SUM_SQUARES, Layout
from harness.stability.statistics import tensor_statistics

__all__ = ["GradientSource", "GradientStatistics", "PlainSource", "RowTable", "gradients_of", "unscaled"]


class GradientSource(Protocol):
    """Measures the gradients of one way of spreading a model. Nothing in it synchronises on CUDA."""

    layout: Layout
    group: dist.ProcessGroup | None
    """The ranks that train together; None: this one alone."""
    num_replicas: int
    """Copies of each element among them."""
    num_shards: int
    """Pieces of each copy, on neighbouring ranks of the group."""
    extremes: bool
    """Whether max-abs and zeros are measured too; to be set before the backward pass."""

    def micro_batch_rows(self) -> Tensor:
        """`[P, 5]`, without extremes, of what this rank has accumulated so far. Costs a pass over the
        gradient unless this micro-batch was reduced, and so measured, already."""

    def local_rows(self, *, unscaled_by: Tensor | None = None) -> Tensor:
        """`[P, 5]` of this rank's accumulated gradient, before any reduction.

        Args:
            unscaled_by: 0-d, what the gradients have been divided by since the backward pass; so is what was
                measured during it.
        """

    def reduced_rows(self) -> Tensor:
        """`[P, 5]`, without extremes, of what the optimizer will use here."""

    @property
    def is_reduced(self) -> bool:
        """Whether every gradient has been through the reduction since `start_step`."""

    def unreduced_parameters(self) -> list[nn.Parameter]:
        """Parameters of the layout that take a gradient which the reduction that was made did not cover."""

    def watch(self, layout: Layout) -> None:
        """Gives rows by another layout from now on, of the step under way too."""

    def start_step(self) -> None:
        """Forgets the step that is over."""

    def close(self) -> None:
        """Stops measuring; the model trains on as if it had never been measured."""


class PlainSource:
    """A model that is not spread, or whose gradients the caller reduces before the guard sees them.

    Args:
        in_backward: Measures gradients while the backward pass goes on; None: once it is over.
    """

    def __init__(
        self, layout: Layout, *, group: dist.ProcessGroup | None, in_backward: BackwardStatistics | None
    ) -> None:
        self.group = group
        self.num_replicas, self.num_shards = 1 if group is None else group.size(), 1
        self._rows: Tensor | None = None
        self._in_backward = in_backward
        self.extremes = True
        self.watch(layout)

    @property
    def extremes(self) -> bool:
        return self._extremes

    @extremes.setter
    def extremes(self, extremes: bool) -> None:
        self._extremes = extremes
        if self._in_backward is not None:
            self._in_backward.extremes = extremes

    def watch(self, layout: Layout) -> None:
        self.layout = layout
        self._table = RowTable(layout)
        if self._in_backward is not None:
            self._in_backward.watch(layout)

    def micro_batch_rows(self) -> Tensor:
        if self._in_backward is not None:
            self._in_backward.every_pass = True
        return self._measure(extremes=False)

    def local_rows(self, *, unscaled_by: Tensor | None = None) -> Tensor:
        if unscaled_by is not None and self._in_backward is not None:
            self._in_backward.forget()  # torch does not count a GradScaler's division as a change
        if self._rows is None:
            self._rows = self._measure(extremes=self.extremes)
        return self._rows

    def _measure(self, *, extremes: bool) -> Tensor:
        known = [] if self._in_backward is None else self._in_backward.current()
        if not known:
            return self._table.measure(extremes=extremes)
        seen = {id(p) for parameters, _ in known for p in parameters}
        others = [p for p in self.layout.parameters if id(p) not in seen]
        rows = self._table.measure(others, extremes=extremes)
        for parameters, statistics in known:
            self._table.put(rows, parameters, statistics)
        return rows

    def reduced_rows(self) -> Tensor:
        return self.local_rows()

    is_reduced = True

    def unreduced_parameters(self) -> list[nn.Parameter]:
        return []

    def start_step(self) -> None:
        self._rows = None
        if self._in_backward is not None:
            self._in_backward.start_step()

    def close(self) -> None:
        self._rows = None
        if self._in_backward is not None:
            self._in_backward.close()


MAX_INDICES = 256
"""Sets of parameters whose indices are cached: models that leave layers out at random have many."""


class RowTable:
    """Puts the statistics of some parameters into the table of all of a layout, on the device. Those of
    parameters without a row are passed over."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._device = layout.parameters[0].device
        self._indices_of: dict[tuple[int, ...], tuple[Tensor | None, Tensor]] = {}
        self._masks: dict[tuple[bool, ...], Tensor] = {}

    def empty(self) -> Tensor:
        """`[P, 5]` of a gradient that is not there: zeros."""
        return torch.zeros(len(self._layout), NUM_COLUMNS, dtype=torch.float64, device=self._device)

    def put(self, rows: Tensor, parameters: Sequence[Tensor], statistics: Tensor) -> Tensor:
        """`rows`, in place, with `statistics` `[len(parameters), 5]` in the rows of `parameters`."""
        chosen, index = self._index(parameters)
        return rows.index_copy_(0, index, statistics if chosen is None else statistics[chosen])

    def take(self, rows: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """`[len(parameters), 5]`, their rows of `rows`; anything for those without a row."""
        chosen, index = self._index(parameters)
        taken = rows.index_select(0, index)
        return (
            taken
            if chosen is None
            else taken.new_zeros(len(parameters), NUM_COLUMNS).index_copy_(0, chosen, taken)
        )

    def mask(self, values: Sequence[bool]) -> Tensor:
        """`[len(values), 1]` bool on the device; copied there once for each combination."""
        key = tuple(values)
        if key not in self._masks:
            self._masks[key] = torch.tensor(values, device=self._device)[:, None]
        return self._masks[key]

    def spread(self, parameters: Sequence[Tensor], statistics: Tensor) -> Tensor:
        """`[P, 5]` with `statistics` in the rows of `parameters` and zeros elsewhere."""
        if len(parameters) == len(self._layout) and list(map(id, parameters)) == list(self._layout.row_of):
            return statistics
        return self.put(self.empty(), parameters, statistics)

    def measure(self, parameters: Sequence[nn.Parameter] | None = None, *, extremes: bool) -> Tensor:
        """`[P, 5]` of the gradients that lie in `parameters`; None: in all of the layout's."""
        having, gradients = gradients_of(self._layout.parameters if parameters is None else parameters)
        if not having:
            return self.empty()
        return self.spread(having, tensor_statistics(gradients, extremes=extremes))

    def _index(self, parameters: Sequence[Tensor]) -> tuple[Tensor | None, Tensor]:
        """Which of `parameters` have a row (None: all) and which row; copied to the device once."""
        key = tuple(map(id, parameters))
        if len(self._indices_of) > MAX_INDICES:
            self._indices_of.clear()
        if key not in self._indices_of:
            row_of = self._layout.row_of
            chosen = [number for number, one in enumerate(key) if one in row_of]
            index = self._on_device([row_of[key[number]] for number in chosen])
            self._indices_of[key] = (None if len(chosen) == len(key) else self._on_device(chosen), index)
        return self._indices_of[key]

    def _on_device(self, numbers: list[int]) -> Tensor:
        host = torch.tensor(numbers, dtype=torch.int64, pin_memory=self._device.type == "cuda")
        return host.to(self._device, non_blocking=True)


class _Note(NamedTuple):
    parameters: Sequence[Tensor]
    statistics: Tensor
    adds: Sequence[bool]


class GradientStatistics:
    """Statistics of one step's gradients, taken group by group (a bucket, an FSDP module) as they are
    reduced; spread into rows only when they are asked for, so that the layout may change meanwhile.

    What was measured of a gradient before is replaced, or added to where the new one is a further piece of
    it. Of each group there is one note, however often there is a backward pass and no step.
    """

    def __init__(self) -> None:
        self._notes: dict[tuple[int, ...], _Note] = {}

    def note(
        self, parameters: Sequence[Tensor], statistics: Tensor, *, adds: Sequence[bool] | None = None
    ) -> None:
        """Takes `[len(parameters), 5]`; `adds` says of each parameter whether this is a further piece."""
        key = tuple(map(id, parameters))
        before = self._notes.pop(key, None)
        adds = adds or [False] * len(parameters)
        if before is not None and any(adds):
            mask = torch.tensor(adds).to(statistics.device, non_blocking=True)[:, None]
            statistics = torch.where(mask, _sum_of_pieces(before.statistics, statistics), statistics)
            adds = before.adds
        self._notes[key] = _Note(parameters, statistics, adds)

    def __bool__(self) -> bool:
        return bool(self._notes)

    def rows(self, table: RowTable) -> Tensor:
        """`[P, 5]`; zeros of parameters of which nothing was noted."""
        notes = list(self._notes.values())
        if len(notes) == 1:
            return table.spread(notes[0].parameters, notes[0].statistics)
        rows, seen = table.empty(), set[int]()
        for parameters, statistics, adds in notes:
            again = [more and id(p) in seen for p, more in zip(parameters, adds, strict=True)]
            seen.update(map(id, parameters))
            if any(again):
                sums = _sum_of_pieces(table.take(rows, parameters), statistics)
                statistics = torch.where(table.mask(again), sums, statistics)
            table.put(rows, parameters, statistics)
        return rows

    def clear(self) -> None:
        self._notes.clear()


def _sum_of_pieces(some: Tensor, others: Tensor) -> Tensor:
    """Rows of a sum from the rows of its two pieces, as if these were orthogonal to one another."""
    total = some + others
    total[:, MAX_ABS] = torch.maximum(some[:, MAX_ABS], others[:, MAX_ABS])
    total[:, NUM_ZERO] = torch.minimum(some[:, NUM_ZERO], others[:, NUM_ZERO])
    return total


def unscaled(rows: Tensor, by: Tensor | None) -> Tensor:
    """`[P, 5]` of gradients, as they are once each element is divided by `by`, 0-d; None: they are not."""
    if by is None:
        return rows
    divisor = torch.ones(NUM_COLUMNS, dtype=rows.dtype, device=rows.device)
    divisor[SUM_SQUARES], divisor[MAX_ABS] = by.double().square(), by
    return rows / divisor


def gradients_of(parameters: Sequence[nn.Parameter]) -> tuple[list[nn.Parameter], list[Tensor]]:
    """Those of `parameters` that have a gradient, and the gradients; of a DTensor, the local shard."""
    pairs = [(p, gradient) for p in parameters if (gradient := p.grad) is not None]
    return [p for p, _ in pairs], [local_part(gradient) for _, gradient in pairs]
