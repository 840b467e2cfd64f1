"""Where gradients are measured: in a model of one process here, under DDP and FSDP2 in modules of their own.

Legend: P parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness.stability.layout import NUM_COLUMNS, Layout
from harness.stability.statistics import tensor_statistics

__all__ = ["GradientSource", "PlainSource", "RowTable", "gradients_of"]


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

    def local_rows(self) -> Tensor:
        """`[P, 5]` of this rank's accumulated gradient, before any reduction."""

    def reduced_rows(self) -> Tensor:
        """`[P, 5]`, without extremes, of what the optimizer will use here."""

    @property
    def is_reduced(self) -> bool:
        """Whether every gradient has been through the reduction since `start_step`."""

    def start_step(self) -> None:
        """Forgets the step that is over."""

    def close(self) -> None:
        """Stops measuring; the model trains on as if it had never been measured."""


class PlainSource:
    """A model that is not spread, or whose gradients the caller reduces before the guard sees them."""

    def __init__(self, model: nn.Module, layout: Layout, *, group: dist.ProcessGroup | None) -> None:
        self.layout = layout
        self.group = group
        self.num_replicas, self.num_shards = 1 if group is None else group.size(), 1
        self.extremes = True
        self._parameters = [p for p in model.parameters() if id(p) in layout.row_of]
        self._table = RowTable(layout, self._parameters[0].device)
        self._rows: Tensor | None = None

    def micro_batch_rows(self) -> Tensor:
        return self._table.measure(self._parameters, extremes=False)

    def local_rows(self) -> Tensor:
        if self._rows is None:
            self._rows = self._table.measure(self._parameters, extremes=self.extremes)
        return self._rows

    def reduced_rows(self) -> Tensor:
        return self.local_rows()

    is_reduced = True

    def start_step(self) -> None:
        self._rows = None

    def close(self) -> None:
        self._parameters = []


class RowTable:
    """Puts the statistics of some parameters into the table of all, on the device."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self._layout = layout
        self._device = device
        self._index_of: dict[tuple[int, ...], Tensor] = {}

    def empty(self) -> Tensor:
        """`[P, 5]` of a gradient that is not there: zeros."""
        return torch.zeros(len(self._layout), NUM_COLUMNS, dtype=torch.float64, device=self._device)

    def index(self, parameters: Sequence[Tensor]) -> Tensor:
        """Rows of `parameters` as a tensor; copied to the device once for each set of parameters."""
        key = tuple(map(id, parameters))
        if key not in self._index_of:
            rows = self._layout.rows(parameters)
            self._index_of[key] = torch.tensor(rows, dtype=torch.int64, device=self._device)
        return self._index_of[key]

    def spread(self, parameters: Sequence[Tensor], statistics: Tensor) -> Tensor:
        """`[P, 5]` with `statistics` in the rows of `parameters` and zeros elsewhere."""
        if len(parameters) == len(self._layout) and list(map(id, parameters)) == list(self._layout.row_of):
            return statistics
        return self.empty().index_copy_(0, self.index(parameters), statistics)

    def measure(self, parameters: Sequence[nn.Parameter], *, extremes: bool) -> Tensor:
        """`[P, 5]` of the gradients that lie in `parameters`."""
        having, gradients = gradients_of(parameters)
        if not having:
            return self.empty()
        return self.spread(having, tensor_statistics(gradients, extremes=extremes))


def gradients_of(parameters: Sequence[nn.Parameter]) -> tuple[list[nn.Parameter], list[Tensor]]:
    """Those of `parameters` that have a gradient, and the gradients; of a DTensor, the local shard."""
    pairs = [(p, gradient) for p in parameters if (gradient := p.grad) is not None]
    gradients: list[Tensor] = [getattr(gradient, "_local_tensor", gradient) for _, gradient in pairs]
    return [p for p, _ in pairs], gradients
