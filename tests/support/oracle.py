"""Gradient statistics in NumPy with a wider accumulator than the code under test, one plain line a column."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["EDGE_VALUES", "awkward", "oracle_statistics"]

EDGE_VALUES = {
    dtype: (
        torch.finfo(dtype).max,
        torch.finfo(dtype).tiny,
        torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps,
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
}
"""Per dtype: the largest finite value, the least normal one and the least denormal one."""


def oracle_statistics(tensors: Sequence[Tensor]) -> Tensor:
    """`[len(tensors), 5]` float64: sum of squares and max-abs of the finite elements, NaN, Inf, zeros."""
    return torch.tensor([_row(tensor) for tensor in tensors], dtype=torch.float64).reshape(-1, 5)


def _row(tensor: Tensor) -> list[float]:
    values = tensor.detach().flatten().double().numpy().astype(np.longdouble)
    finite = values[np.isfinite(values)]
    return [
        float(np.sum(finite * finite)),
        float(np.max(np.abs(finite), initial=0.0)),
        float(np.isnan(values).sum()),
        float(np.isinf(values).sum()),
        float((values == 0).sum()),
    ]


def awkward(size: int, *, seed: int, dtype: torch.dtype = torch.float32, share: float = 0.02) -> Tensor:
    """Normal noise over 12 orders of magnitude with, each at about `share` of the places: NaN, both Infs,
    both zeros, the largest finite values, the least normal and the least denormal one."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=generator) * 10 ** (torch.rand(size, generator=generator) * 12 - 8)
    largest, normal, denormal = EDGE_VALUES[dtype]
    edges = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, largest, -largest, normal, -denormal]
    for edge in edges:
        values[torch.rand(size, generator=generator) < share] = edge
    return values.to(dtype)
