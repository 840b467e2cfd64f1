"""Integer checksums of tensors: exact sums of raw bits, whatever the order of summation."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from harness.dist import local_part
from harness.stability import native

__all__ = ["fingerprint", "sum_of_bits"]

_INTEGER_OF = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer type by bytes per element."""

MAX_WEIGHTED = 1 << 12
"""Elements up to which places count too, and of larger tensors those that are looked at."""

LARGE = 1 << 14
"""Elements from which a compiled loop is faster than torch, which takes five times as long for each."""

_weights: dict[torch.device, Tensor] = {}


def sum_of_bits(tensor: Tensor) -> Tensor:
    """0-d int64: the sum of the raw bits of this rank's part, read as integers. One flipped bit changes it by
    a power of two. Reads everything once; does not synchronise."""
    bits = _bits(local_part(tensor).detach().contiguous())
    if bits.device.type == "cpu" and bits.numel() >= LARGE and native.is_available():
        return native.sum_of_integers(bits)
    return bits.sum(dtype=torch.int64)


def fingerprint(tensor: Tensor) -> Tensor:
    """0-d int64 of up to 4,096 elements, in their order; of a larger tensor one in each of as many equal
    stretches, at a place drawn once for all. Does not synchronise."""
    flat = local_part(tensor).detach().reshape(-1)
    if flat.numel() > MAX_WEIGHTED:
        flat = flat[_places(flat.numel(), flat.device)]
    weights = _weights.get(flat.device)
    if weights is None:
        # Odd and of many bits, so that elements that change places do not cancel.
        weights = torch.arange(1, MAX_WEIGHTED + 1, device=flat.device) * 0x9E3779B97F4A7C1 * 2 + 1
        _weights[flat.device] = weights
    return (_bits(flat.contiguous()).long() * weights[: flat.numel()]).sum()


@functools.lru_cache(maxsize=256)
def _places(num: int, device: torch.device) -> Tensor:
    """`[MAX_WEIGHTED]` int64, the same on all ranks. Not evenly spaced: a stride may be that of the rows, and
    see one column, which is empty in images."""
    generator = torch.Generator().manual_seed(num)
    begin = torch.arange(MAX_WEIGHTED) * num // MAX_WEIGHTED
    width = (torch.arange(1, MAX_WEIGHTED + 1) * num // MAX_WEIGHTED) - begin
    draws = torch.rand(MAX_WEIGHTED, generator=generator, dtype=torch.float64)
    places = begin + (draws * width).long()
    return places.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else places


def _bits(tensor: Tensor) -> Tensor:
    values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return values.view(_INTEGER_OF[values.element_size()])
