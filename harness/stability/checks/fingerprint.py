"""Integer checksums of tensors: exact sums of raw bits, whatever the order of summation."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from harness.dist import local_part
from harness.stability import native

__all__ = ["fingerprint", "sample_fingerprints", "spread_places", "sum_of_bits"]

_INTEGER_OF = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer type by bytes per element."""

MAX_WEIGHTED = 1 << 12
"""Elements up to which places count too, and of larger tensors those that are looked at."""

LARGE = 1 << 14
"""Elements from which a compiled loop is faster than torch, which takes five times as long for each."""

MAX_SAMPLES = 256
"""Of a batch, that are looked at."""

MIN_OF_SAMPLE, MAX_OF_SAMPLE = 16, 128
"""Elements of a sample that are looked at."""

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
        flat = flat[spread_places(flat.numel(), MAX_WEIGHTED, flat.device)]
    return (_bits(flat.contiguous()).long() * _weights_on(flat.device)[: flat.numel()]).sum()


def sample_fingerprints(batch: Tensor) -> Tensor:
    """`[up to 256]` int64, one of each sample: the entries of the first dimension, by 16 to 128 elements
    each, about 4,096 in all. It depends on the sample's content and shape, and not on its place; of a batch
    of another power of two of samples it is another one. Does not synchronise."""
    samples = batch.detach().reshape(len(batch), -1)
    samples = samples[:: -(-len(samples) // MAX_SAMPLES)]
    num = 1 << (len(samples) - 1).bit_length()
    count = min(max(MAX_WEIGHTED // num, MIN_OF_SAMPLE), MAX_OF_SAMPLE)
    if samples.shape[1] > count:
        samples = samples[:, spread_places(samples.shape[1], count, samples.device)]
    bits = _bits(samples.contiguous()).flatten(1)
    sums = (bits.long() * _weights_on(samples.device)[: bits.shape[1]]).sum(dim=1)  # CUDA has no integer @
    # Mixed, so that the high bits are evenly spread too.
    return (sums ^ (sums >> 29)) * 0x3F58476D1CE4E5B9


def _weights_on(device: torch.device) -> Tensor:
    """`[MAX_WEIGHTED]` int64, odd and of many bits, so that elements that change places do not cancel."""
    weights = _weights.get(device)
    if weights is None:
        weights = torch.arange(1, MAX_WEIGHTED + 1, device=device) * 0x9E3779B97F4A7C1 * 2 + 1
        _weights[device] = weights
    return weights


@functools.lru_cache(maxsize=256)
def spread_places(num: int, count: int, device: torch.device) -> Tensor:
    """`[count]` int64 below `num`, the same on all ranks. Not evenly spaced: a stride may be that of the
    rows, and see one column, which is empty in images."""
    generator = torch.Generator().manual_seed(num)
    begin = torch.arange(count) * num // count
    width = (torch.arange(1, count + 1) * num // count) - begin
    draws = torch.rand(count, generator=generator, dtype=torch.float64)
    places = begin + (draws * width).long()
    return places.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else places


def _bits(tensor: Tensor) -> Tensor:
    values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return values.view(_INTEGER_OF[values.element_size()])
