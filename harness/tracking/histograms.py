"""Histograms of tensors, counted where the tensors are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

__all__ = ["histograms"]

NUM_BINS = 64
CHUNK = 1 << 24
"""Elements counted at once: `histc` counts in float32, which is exact up to here."""


def histograms(tensors: Mapping[str, Tensor], *, num_bins: int = NUM_BINS) -> dict[str, dict[str, Any]]:
    """Counts the finite elements of each tensor in `num_bins` equal bins between their extremes.

    Everything is computed on the tensors' devices and read in one copy per device: one synchronisation.
    Of a DTensor this rank's shard is counted, of a sparse tensor what it stores. What holds no elements, such
    as a parameter that is still to be initialised, is left out.

    Returns:
        By name: `counts` and `edges` (one more), `min`, `max`, `num`, `sum`, `sum_squares` over the finite
        elements, and how many were not: `num_nan`, `num_inf`. Tensors without a finite element have one bin.
    """
    local = {name: _local(tensor) for name, tensor in tensors.items() if _has_elements(tensor)}
    local = {name: tensor for name, tensor in local.items() if tensor.numel()}
    rows: dict[str, list[float]] = {}
    for device in {tensor.device for tensor in local.values()}:
        here = {name: tensor for name, tensor in local.items() if tensor.device == device}
        packed = torch.stack([_row(tensor, num_bins) for tensor in here.values()]).tolist()
        rows |= dict(zip(here, packed, strict=True))
    return {name: _unpack(rows[name], num_bins) for name in local}


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
    tensor = tensor if tensor.layout == torch.strided else tensor.values()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _has_elements(tensor: Tensor) -> bool:
    return not is_lazy(tensor) and tensor.device.type != "meta"


def _row(tensor: Tensor, num_bins: int) -> Tensor:
    """float64 [6 + num_bins]: min, max, sum, sum of squares, NaN, Inf, counts."""
    values = tensor.flatten().float()
    finite = values.isfinite()
    low = torch.where(finite, values, torch.inf).min()
    high = torch.where(finite, values, -torch.inf).max()
    exact = torch.where(finite, values, 0.0).double()
    counts = _counts(values, finite, low, high, num_bins)
    sums = [exact.sum(), exact.square().sum(), values.isnan().sum(), values.isinf().sum()]
    return torch.cat([torch.stack([low.double(), high.double(), *(s.double() for s in sums)]), counts])


def _counts(values: Tensor, finite: Tensor, low: Tensor, high: Tensor, num_bins: int) -> Tensor:
    """Elements per bin, without knowing the range on the host: values are mapped to [0, 1] first."""
    half = 0.5  # the range itself may overflow
    width = (high * half - low * half).clamp_min(torch.finfo(values.dtype).tiny)
    unit = ((values * half - low * half) / width).clamp(0.0, 1.0)
    unit = torch.where(finite, unit, -1.0)  # outside the range that is counted
    if values.is_cuda and torch.are_deterministic_algorithms_enabled():
        edges = torch.linspace(0, 1, num_bins + 1, device=values.device)
        edges[-1] = torch.inf  # the last bin is closed
        below = torch.searchsorted(unit.sort().values, edges)
        return below.diff().double()
    counts = torch.zeros(num_bins, dtype=torch.float64, device=values.device)
    for chunk in unit.split(CHUNK):
        counts += torch.histc(chunk, num_bins, 0.0, 1.0).double()
    return counts


def _unpack(row: list[float], num_bins: int) -> dict[str, Any]:
    low, high, total, squares, num_nan, num_inf, *counts = row
    num = sum(counts)
    if num == 0:
        low = high = 0.0
        counts, num_bins = [0.0], 1
    width = (high - low) / num_bins
    return {
        "counts": counts,
        "edges": [low + i * width for i in range(num_bins)] + [high],
        "min": low,
        "max": high,
        "num": num,
        "sum": total,
        "sum_squares": squares,
        "num_nan": num_nan,
        "num_inf": num_inf,
    }
