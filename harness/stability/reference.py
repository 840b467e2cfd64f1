"""Gradient statistics in plain torch: the specification of the kernels, and the path on the CPU.

Columns of a row: sum of squares and max-abs over the finite elements, numbers of NaN, Inf and zero elements,
all float64 (counts are exact to 2^53). The sum of squares is taken in fp32 over chunks and accumulated in
float64; a finite sum proves that a chunk holds neither NaN nor Inf, so the exact pass in float64 is taken
only for chunks whose fp32 sum is not finite: those that hold a NaN or an Inf, and those whose squares overflow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from harness.stability.layout import NUM_COLUMNS

__all__ = ["bucket_statistics", "tensor_statistics"]

CHUNK = 1 << 19
"""Elements measured at once."""


def bucket_statistics(flat: Tensor, sizes: Sequence[int], *, extremes: bool = True) -> Tensor:
    """Statistics of consecutive segments of a flat buffer: `[len(sizes), 5]` float64 on the CPU.

    Args:
        flat: `[N]` floating point; elements after the last segment (padding) are not measured.
        sizes: Elements per segment; 0 is allowed.
        extremes: False leaves max-abs and the number of zeros out (NaN: not measured), which is cheaper.
    """
    return _table([_row(segment, extremes) for segment in flat[: sum(sizes)].split(list(sizes))])


def tensor_statistics(tensors: Sequence[Tensor], *, extremes: bool = True) -> Tensor:
    """Statistics of tensors of any shapes and floating dtypes: `[len(tensors), 5]` float64 on the CPU."""
    return _table([_row(flattened(tensor), extremes) for tensor in tensors])


def flattened(tensor: Tensor) -> Tensor:
    """All elements as one dimension in memory order, without a copy if the tensor is dense in memory."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    by_stride = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    return tensor.permute(by_stride).reshape(-1)


def _table(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, NUM_COLUMNS)


def _row(segment: Tensor, extremes: bool) -> list[float]:
    sum_squares, max_abs, num_nan, num_inf, num_zero = 0.0, 0.0, 0, 0, 0
    for chunk in segment.detach().split(CHUNK):
        squares, largest, nans, infs, zeros = _chunk(chunk.float(), extremes)
        sum_squares += squares
        max_abs = max(max_abs, largest)
        num_nan, num_inf, num_zero = num_nan + nans, num_inf + infs, num_zero + zeros
    return [
        sum_squares,
        max_abs if extremes else math.nan,
        num_nan,
        num_inf,
        num_zero if extremes else math.nan,
    ]


def _chunk(chunk: Tensor, extremes: bool) -> tuple[float, float, int, int, int]:
    sum_squares = torch.dot(chunk, chunk).item()
    if not math.isfinite(sum_squares):
        return _exact_chunk(chunk)
    if not extremes or not chunk.numel():
        return sum_squares, 0.0, 0, 0, 0
    low, high = torch.aminmax(chunk)
    zeros = chunk.numel() - int(torch.count_nonzero(chunk))
    return sum_squares, max(-low.item(), high.item()), 0, 0, zeros


def _exact_chunk(chunk: Tensor) -> tuple[float, float, int, int, int]:
    finite = chunk.isfinite()
    values = chunk.where(finite, 0.0).double()
    num_nan = int(chunk.isnan().sum())
    num_inf = chunk.numel() - int(finite.sum()) - num_nan
    return (
        torch.dot(values, values).item(),
        values.abs().max().item(),
        num_nan,
        num_inf,
        int((chunk == 0).sum()),
    )
