"""Gradient statistics on whatever device the gradients are: torch on the CPU, Triton kernels on CUDA."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from harness.stability import reference
from harness.stability.layout import MAX_ABS, NUM_COLUMNS, NUM_INF, NUM_NAN, NUM_ZERO, SUM_SQUARES

__all__ = [
    "MAX_ABS",
    "NUM_COLUMNS",
    "NUM_INF",
    "NUM_NAN",
    "NUM_ZERO",
    "SUM_SQUARES",
    "bucket_statistics",
    "tensor_statistics",
]


def bucket_statistics(flat: Tensor, sizes: Sequence[int], *, extremes: bool = True) -> Tensor:
    """Statistics of consecutive segments of a flat gradient buffer. On CUDA it does not synchronise.

    Args:
        flat: `[N]` of fp32, bf16 or fp16; elements after the last segment (padding) are not measured.
        sizes: Elements per segment; 0 is allowed.
        extremes: False leaves max-abs and the number of zeros out (NaN: not measured), which is cheaper.

    Returns:
        `[len(sizes), 5]` float64 on `flat`'s device: sum of squares and max-abs over the finite elements,
        numbers of NaN, Inf and zero elements.
    """
    return reference.bucket_statistics(flat, sizes, extremes=extremes)


def tensor_statistics(tensors: Sequence[Tensor], *, extremes: bool = True) -> Tensor:
    """Statistics of tensors that share no buffer: `[len(tensors), 5]` as `bucket_statistics` gives them.

    All tensors are on one device; shapes and dtypes may differ.
    """
    return reference.tensor_statistics(tensors, extremes=extremes)
