"""What a step did to the weights, measured every so many steps: norms, updates, second moments, underflow.

Exact where one read of a tensor is enough. The size of an update would need a copy of all parameters; it is
estimated from up to 2^15 evenly spaced elements of each, which puts it within about 1 %.

Legend: P parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from harness.dist import local_part
from harness.records import ParameterSample
from harness.stability.layout import SUM_SQUARES, Layout
from harness.stability.optimizers import StateOf
from harness.stability.statistics import tensor_statistics

__all__ = ["WeightSampler", "parameter_samples"]

MIN_SAMPLED = 1 << 14
"""Elements of a parameter that are looked at, at least, if it has so many."""

WEIGHT_SQUARES, UPDATE_SQUARES, MOMENT_MIN, MOMENT_MAX, NUM_UNDERFLOWN = range(5)


class WeightSampler:
    """Looks at parameters just before and just after the optimizer's step. Nothing in it synchronises.

    Args:
        state_of: Gives the optimizer's state of a parameter.
        precision: Of the arithmetic that made the gradients; what is too small for it counts as underflown.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], state_of: StateOf, *, precision: torch.dtype
    ) -> None:
        self._parameters = parameters
        self._state_of = state_of
        self._least_normal = torch.finfo(precision).tiny
        self._before: list[Tensor] = []
        self._underflown: list[Tensor] = []

    def before(self) -> None:
        """Keeps some elements of each parameter, and looks at gradients before the optimizer scales them."""
        self._before = [_some(p).clone() for p in self._parameters]
        self._underflown = [self._num_underflown(p) for p in self._parameters]

    def after(self) -> Tensor:
        """`[P, 5]` float64 on the device, of this rank's share of each parameter."""
        weights = tensor_statistics([_local(p) for p in self._parameters], extremes=False)
        rows = [
            torch.stack([weights[row, SUM_SQUARES], *self._row(row, p)])
            for row, p in enumerate(self._parameters)
        ]
        self._before, self._underflown = [], []
        return torch.stack(rows)

    def _row(self, row: int, parameter: nn.Parameter) -> list[Tensor]:
        change = _some(parameter).double() - self._before[row].double()
        squares = change.square().sum() * _elements_per_sampled(parameter)
        return [squares, *self._moment_extremes(parameter), self._underflown[row]]

    def _moment_extremes(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor]:
        moment = self._state_of(parameter).get("exp_avg_sq")
        if moment is None or not _local(moment).numel():
            nothing = torch.full((), torch.nan, dtype=torch.float64, device=parameter.device)
            return nothing, nothing
        low, high = _local(moment).aminmax()
        return low.double(), high.double()

    def _num_underflown(self, parameter: nn.Parameter) -> Tensor:
        if parameter.grad is None:
            return torch.zeros((), dtype=torch.float64, device=parameter.device)
        size = _some(parameter.grad).abs()
        count = ((size > 0) & (size < self._least_normal)).sum()
        return count.double() * _elements_per_sampled(parameter)


def parameter_samples(table: Tensor, layout: Layout) -> dict[str, ParameterSample]:
    """The samples as values.

    Args:
        table: `[S, P, 5]` float64 on the host, `WeightSampler.after` of each shard.
    """
    totals = table.sum(0)
    low, high = table[:, :, MOMENT_MIN], table[:, :, MOMENT_MAX]
    least, largest = low.nan_to_num(torch.inf).amin(0), high.nan_to_num(-torch.inf).amax(0)
    found: dict[str, ParameterSample] = {}
    for row, name in enumerate(layout.names):
        weight, update = (float(totals[row, column].sqrt()) for column in (WEIGHT_SQUARES, UPDATE_SQUARES))
        has_moments = bool(low[:, row].isfinite().any())
        found[name] = ParameterSample(
            weight_norm=weight,
            update_norm=update,
            update_ratio=update / weight if weight else None,
            second_moment_min=float(least[row]) if has_moments else None,
            second_moment_max=float(largest[row]) if has_moments else None,
            underflow_frac=float(totals[row, NUM_UNDERFLOWN]) / max(layout.sizes[row], 1),
        )
    return found


def _some(tensor: Tensor) -> Tensor:
    """Evenly spaced elements of this rank's share of `tensor`, a view where it is contiguous."""
    flat = _local(tensor).reshape(-1)
    return flat[:: max(1, flat.numel() // MIN_SAMPLED)]


def _elements_per_sampled(parameter: Tensor) -> float:
    return _local(parameter).numel() / max(_some(parameter).numel(), 1)


def _local(tensor: Tensor) -> Tensor:
    return local_part(tensor).detach()
