"""Gradient statistics on the device that holds the gradients: by Triton kernels on CUDA, on the CPU by a
compiled loop, or else torch."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence, Set

import torch
from torch import Tensor

from harness.errors import ConfigError
from harness.stability import native, reference
from harness.stability.layout import MAX_ABS, NUM_COLUMNS, NUM_INF, NUM_NAN, NUM_ZERO, SUM_SQUARES

__all__ = [
    "MAX_ABS",
    "NUM_COLUMNS",
    "NUM_INF",
    "NUM_NAN",
    "NUM_ZERO",
    "SUM_SQUARES",
    "bucket_statistics",
    "is_measurable",
    "tensor_statistics",
]

ON_CUDA = (torch.float32, torch.bfloat16, torch.float16)
LAYOUT, DTYPE = operator.attrgetter("layout"), operator.attrgetter("dtype")
ON_CPU = (*ON_CUDA, torch.float64)


def bucket_statistics(flat: Tensor, sizes: Sequence[int], *, extremes: bool = True) -> Tensor:
    """Statistics of consecutive segments of a flat gradient buffer. On CUDA it does not synchronise.

    Args:
        flat: `[N]` of fp32, bf16 or fp16, on the CPU also float64; elements after the last segment (padding)
            are not measured.
        sizes: Elements per segment; 0 is allowed.
        extremes: False leaves max-abs and the number of zeros out (NaN: not measured), which may be cheaper.

    Returns:
        `[len(sizes), 5]` float64 on `flat`'s device: sum of squares and max-abs over the finite elements,
        numbers of NaN, Inf and zero elements.

    Raises:
        ConfigError: a sparse gradient, or a dtype that is not measured on this device.
    """
    _check(flat.layout, flat.dtype, flat.device)
    if flat.device.type == "cpu":
        if _is_native({flat.dtype}):
            return native.tensor_statistics(flat.detach()[: sum(sizes)].split(list(sizes)), extremes=extremes)
        return reference.bucket_statistics(flat, sizes, extremes=extremes)
    from harness.stability import kernels  # needs Triton, which machines without a GPU do not have

    return kernels.bucket_statistics(flat, sizes, extremes=extremes)


def tensor_statistics(tensors: Sequence[Tensor], *, extremes: bool = True) -> Tensor:
    """Statistics of tensors that share no buffer: `[len(tensors), 5]` as `bucket_statistics` gives them.

    All tensors are on one device; shapes and dtypes may differ.
    """
    # One question to hundreds of tensors is a part of a step's host time: maps ask in C.
    layouts, dtypes = set(map(LAYOUT, tensors)), set(map(DTYPE, tensors))
    device = tensors[0].device if tensors else torch.device("cpu")
    for layout, dtype in itertools.product(layouts, dtypes):
        _check(layout, dtype, device)
    if device.type == "cpu":
        if _is_native(dtypes):
            return native.tensor_statistics(tensors, extremes=extremes)
        return reference.tensor_statistics(tensors, extremes=extremes)
    from harness.stability import kernels

    return kernels.tensor_statistics(tensors, extremes=extremes)


def is_measurable(tensor: Tensor) -> bool:
    """Whether these functions take it."""
    dtypes = ON_CPU if tensor.device.type == "cpu" else ON_CUDA
    return tensor.dtype in dtypes and tensor.layout == torch.strided


def _is_native(dtypes: Set[torch.dtype]) -> bool:
    return dtypes <= native.MEASURED and native.is_available()


def _check(layout: torch.layout, dtype: torch.dtype, device: torch.device) -> None:
    dtypes = ON_CPU if device.type == "cpu" else ON_CUDA
    if dtype not in dtypes or layout != torch.strided:
        raise ConfigError(
            f"a gradient is {layout}, {dtype} on {device.type}",
            rule=f"gradients are dense and one of {', '.join(map(str, dtypes))} there",
            remedy="use sparse=False in embeddings, or train in one of these precisions",
        )
