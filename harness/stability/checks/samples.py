"""What a step did to the weights, measured every so many steps: norms, updates, second moments, underflow.

Exact where one read of a tensor is enough. The size of an update would need a copy of all parameters; it is
estimated from up to 2^15 evenly spaced elements of each, which puts it within about 1 %.

Legend: P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from harness.config import GuardConfig
from harness.dist import local_part
from harness.records import ParameterSample
from harness.stability.checks.base import Arrived, Check, Reading, StepView
from harness.stability.layout import SUM_SQUARES, Layout
from harness.stability.statistics import tensor_statistics

__all__ = ["SamplesCheck", "parameter_samples"]

MIN_SAMPLED = 1 << 14
"""Elements of a parameter that are looked at, at least, if it has so many."""

WEIGHT_SQUARES, UPDATE_SQUARES, MOMENT_MIN, MOMENT_MAX, NUM_UNDERFLOWN = range(5)


class SamplesCheck(Check):
    """Fills `StepRecord.sampled`: parameters just before an optimizer's step, and in the next step what it
    made of them, so that they travel with that step's gather."""

    name = "samples"
    delay = 1
    same_on_replicas = True

    def __init__(self, config: GuardConfig) -> None:
        self.every = config.sample_every
        self.forget()

    def forget(self) -> None:
        self._layout: Layout | None = None
        self._before: list[Tensor] = []
        self._underflown: list[Tensor] = []

    def before_update(self, view: StepView) -> None:
        """Keeps some elements of each parameter, and looks at gradients before the optimizer scales them."""
        least_normal = torch.finfo(view.precision).tiny
        self._layout = view.layout
        self._before = [_some(p).clone() for p in view.layout.parameters]
        self._underflown = [_num_underflown(p, least_normal) for p in view.layout.parameters]

    def measure(self, view: StepView) -> Tensor | None:
        """`[P, 5]` of this rank's share of each parameter; None after a change of what the optimizer
        holds."""
        if self._layout is not view.layout:
            self.forget()
            return None
        weights = tensor_statistics([_local(p) for p in view.layout.parameters], extremes=False)
        parameters = view.layout.parameters
        extremes = [_moment_extremes(p, view.state_of(p)) for p in parameters]
        columns = [
            weights[:, SUM_SQUARES],
            torch.stack(list(map(_update_squares, parameters, self._before))),
            torch.stack([low for low, _ in extremes]).double(),
            torch.stack([high for _, high in extremes]).double(),
            torch.stack(self._underflown),
        ]
        self.forget()
        return torch.stack(columns, dim=1)

    def read(self, numbers: Tensor, arrived: Arrived) -> Reading:
        """Of `[S, P, 5]`."""
        return Reading(fields={"sampled": parameter_samples(numbers, arrived.layout)})


def _update_squares(parameter: nn.Parameter, before: Tensor) -> Tensor:
    change = _some(parameter).double() - before.double()
    return change.square().sum() * _elements_per_sampled(parameter)


def _moment_extremes(parameter: nn.Parameter, state: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    moment = state.get("exp_avg_sq")
    if moment is None or not _local(moment).numel():
        nothing = torch.full((), torch.nan, dtype=torch.float64, device=parameter.device)
        return nothing, nothing
    least, largest = _local(moment).aminmax()
    return least, largest


def _num_underflown(parameter: nn.Parameter, least_normal: float) -> Tensor:
    if parameter.grad is None:
        return torch.zeros((), dtype=torch.float64, device=parameter.device)
    size = _some(parameter.grad).abs()
    count = ((size > 0) & (size < least_normal)).sum()
    return count.double() * _elements_per_sampled(parameter)


def parameter_samples(table: Tensor, layout: Layout) -> dict[str, ParameterSample]:
    """The samples as values.

    Args:
        table: `[S, P, 5]` float64 on the host, what each shard measured.
    """
    totals = table.sum(0)
    low, high = table[:, :, MOMENT_MIN], table[:, :, MOMENT_MAX]
    # As lists at once: a question to a tensor takes as long as hundreds to a list.
    has_moments = low.isfinite().any(0).tolist()
    least = low.nan_to_num(torch.inf).amin(0).tolist()
    largest = high.nan_to_num(-torch.inf).amax(0).tolist()
    weights = totals[:, WEIGHT_SQUARES].sqrt().tolist()
    updates = totals[:, UPDATE_SQUARES].sqrt().tolist()
    underflown = totals[:, NUM_UNDERFLOWN].tolist()
    return {
        name: ParameterSample(
            weight_norm=weights[row],
            update_norm=updates[row],
            update_ratio=updates[row] / weights[row] if weights[row] else None,
            second_moment_min=least[row] if has_moments[row] else None,
            second_moment_max=largest[row] if has_moments[row] else None,
            underflow_frac=underflown[row] / max(layout.sizes[row], 1),
        )
        for row, name in enumerate(layout.names)
    }


def _some(tensor: Tensor) -> Tensor:
    """Evenly spaced elements of this rank's share of `tensor`, a view where it is contiguous."""
    flat = _local(tensor).reshape(-1)
    return flat[:: max(1, flat.numel() // MIN_SAMPLED)]


def _elements_per_sampled(parameter: Tensor) -> float:
    return _local(parameter).numel() / max(_some(parameter).numel(), 1)


def _local(tensor: Tensor) -> Tensor:
    return local_part(tensor).detach()
