"""AdamW as a Triton kernel: it takes verdict, clip factor and loss scale as it reads, and writes no gradient.

A program per chunk of a parameter: it reads parameter, gradient and both moments once, writes all but the
gradient, and leaves partial sums of the squared update and weights. A second kernel adds the chunks' in a
fixed order, so the same step gives the same bits every time.

The formula is that of torch's fused AdamW on CUDA, in fp32 whatever the parameters' dtype; so are 1 - beta
and beta^t, of betas in fp32 (torch 2.13). Elsewhere torch takes 1 - beta in double: at beta2 = 0.999 its
second moment is 217 units in the last place away, and so is its correction, by which it is divided.

    g = gradient / grad_scale
    p = p - lr * weight_decay * p
    m = fma(beta1, m, (1 - beta1) * g)
    v = fma(beta2, v, (1 - beta2) * (g * g))
    p = p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

Legend: P parameters, C chunks. All indices count elements from a base address and are int64.

This module imports `triton`: import it where there is a CUDA device, or with `TRITON_INTERPRET=1`.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["BLOCK", "MEASURED", "NUM_BAD", "UPDATE_SQUARES", "WEIGHT_SQUARES", "adamw"]

BLOCK = 2048
"""Elements per chunk: four are read and three written, so fewer than the statistics' are in flight."""

WARPS = 4

VECTOR = 16
"""Elements. Where all tensors start at multiples of this, full chunks are read in whole vectors."""

UPDATE_SQUARES, WEIGHT_SQUARES, NUM_BAD = range(3)
MEASURED = 3
"""Columns of what a step measures: sums of squares of the update and of the weights after it, and the number
of weights and moments that are not finite then."""

_VECTOR = tl.constexpr(VECTOR)


@dataclass(frozen=True, slots=True)
class _Table:
    """Where the chunks lie: of parameters, gradients, first and second moments alike."""

    segments: Tensor
    """`[C]` int64, which parameter a chunk is of."""
    offsets: Tensor
    """`[C]` int64, elements from the parameter's start."""
    lengths: Tensor
    """`[C]` int64, 1 to block."""
    first_chunk: Tensor
    """`[P + 1]` int64."""
    starts: Tensor
    """`[4, P]` int64: elements from each base to each tensor."""
    is_aligned: bool

    def to(self, device: torch.device) -> _Table:
        if device.type == "cpu":
            return self
        moved = (
            one.pin_memory().to(device, non_blocking=True)
            for one in (self.segments, self.offsets, self.lengths, self.first_chunk, self.starts)
        )
        segments, offsets, lengths, first_chunk, starts = moved
        return _Table(segments, offsets, lengths, first_chunk, starts, self.is_aligned)


def adamw(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    bias_corrections: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: Tensor,
    found_inf: Tensor,
    block: int = BLOCK,
) -> Tensor:
    """One step over dense tensors of one dtype (fp32, bf16 or fp16) and device, in place. Gradient and
    moments lie as their parameter does.

    Args:
        bias_corrections: `[P, 2]` fp32: 1 - beta1^t and sqrt(1 - beta2^t).
        grad_scale: 0-d fp32: gradients are divided by it.
        found_inf: 0-d fp32: if it is not 0, nothing is written.

    Returns:
        `[P, MEASURED]` float64 on the device. Of a step that was left out the update is 0.
    """
    lists = (parameters, gradients, exp_avgs, exp_avg_sqs)
    # An empty tensor, a shard say, has no address; it has no chunks either.
    lowest = [
        min(filter(Tensor.numel, tensors), key=Tensor.data_ptr, default=tensors[0]) for tensors in lists
    ]
    addresses = tuple(
        tuple((one if one.numel() else base).data_ptr() for one in tensors)
        for tensors, base in zip(lists, lowest, strict=True)
    )
    bases = [_bits(base) for base in lowest]
    sizes = tuple(map(Tensor.numel, parameters))
    device = parameters[0].device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    table = _cached_table(addresses, sizes, block, device, stream, bases[0].element_size())
    num_chunks = len(table.segments)
    partial = torch.empty(MEASURED + 1, num_chunks, dtype=torch.float64, device=device)
    result = torch.empty(len(sizes), MEASURED, dtype=torch.float64, device=device)
    with torch.cuda.device_of(bases[0]):
        if num_chunks:
            where = (table.segments, table.offsets, table.lengths, table.starts, len(sizes))
            scalars = [ctypes.c_float(one).value for one in (lr, *betas, eps, weight_decay)]  # as fp32
            step_inputs = (bias_corrections, grad_scale, found_inf, partial, num_chunks)
            _step_chunk[(num_chunks,)](
                *bases, *where, *step_inputs, *scalars,
                BLOCK=block, ALIGNED=table.is_aligned, num_warps=WARPS,
            )  # fmt: skip
        _add_chunks[(len(sizes),)](partial, table.first_chunk, result, num_chunks, ROWS=256)
    return result


def _bits(tensor: Tensor) -> Tensor:
    """The elements in the order in which they lie; bf16 as int16, widened by a shift and rounded by hand, as
    the interpreter has no arithmetic for it."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    return flat.view(torch.int16) if flat.dtype == torch.bfloat16 else flat


@functools.lru_cache(maxsize=64)
def _cached_table(
    addresses: tuple[tuple[int, ...], ...],
    sizes: tuple[int, ...],
    block: int,
    device: torch.device,
    stream: int,
    item_bytes: int,
) -> _Table:
    """A table belongs to the stream that it was copied on: another one might read it before it is there."""
    starts = torch.tensor(
        [[(a - min(one)) // item_bytes for a in one] for one in addresses], dtype=torch.int64
    )
    size = torch.tensor(sizes, dtype=torch.int64)
    num_chunks = (size + block - 1) // block
    first_chunk = torch.cat([num_chunks.new_zeros(1), num_chunks.cumsum(0)])
    segments = torch.repeat_interleave(num_chunks)
    offsets = (torch.arange(len(segments)) - first_chunk[segments]) * block
    lengths = torch.minimum(size[segments] - offsets, torch.tensor(block))
    is_aligned = block % VECTOR == 0 and bool((starts % VECTOR == 0).all())
    return _Table(segments, offsets, lengths, first_chunk, starts, is_aligned).to(device)


@triton.jit  # type: ignore[untyped-decorator]
def _load(base, start, lane, length, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """As fp32; int16 stands for the bits of bf16."""
    if ALIGNED:
        if length == BLOCK:
            # The compiler can see that it is aligned: unmasked vector loads.
            raw = tl.load(base + start // _VECTOR * _VECTOR + lane)
        else:
            raw = tl.load(base + start + lane, mask=lane < length, other=0)
    else:
        raw = tl.load(base + start + lane, mask=lane < length, other=0)
    if raw.dtype == tl.int16:
        values = (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        values = raw.to(tl.float32)
    return values


@triton.jit  # type: ignore[untyped-decorator]
def _store(  # type: ignore[no-untyped-def]
    base, start, stored, lane, length, BLOCK: tl.constexpr, ALIGNED: tl.constexpr
):
    if ALIGNED:
        if length == BLOCK:
            tl.store(base + start // _VECTOR * _VECTOR + lane, stored)
        else:
            tl.store(base + start + lane, stored, mask=lane < length)
    else:
        tl.store(base + start + lane, stored, mask=lane < length)


@triton.jit  # type: ignore[untyped-decorator]
def _rounded(values, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """fp32 as what is stored: for bf16 its bits, rounded to the nearest even one."""
    if KIND == tl.int16:  # noqa: SIM300
        bits = values.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        stored = tl.where(values != values, 0x7FC0, nearest).to(tl.int16)
    else:
        stored = values.to(KIND)
    return stored


@triton.jit
def _widened(stored):  # type: ignore[no-untyped-def]
    if stored.dtype == tl.int16:
        values = (stored.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        values = stored.to(tl.float32)
    return values


@triton.jit(do_not_specialize=["num_chunks", "num_segments", "lr", "beta1", "beta2", "eps", "weight_decay"])  # type: ignore[untyped-decorator]
def _step_chunk(  # type: ignore[no-untyped-def]
    p_base, g_base, m_base, v_base, segments, offsets, lengths, starts, num_segments, corrections,
    grad_scale, found_inf, partial, num_chunks, lr, beta1, beta2, eps, weight_decay,
    BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One chunk of one parameter; partial[:, chunk] = what is measured of it."""
    chunk = tl.program_id(0)
    segment, offset, length = tl.load(segments + chunk), tl.load(offsets + chunk), tl.load(lengths + chunk)
    lane = tl.arange(0, BLOCK)
    inside = lane < length
    p_start = tl.load(starts + segment) + offset
    p = _load(p_base, p_start, lane, length, BLOCK, ALIGNED)
    row = partial + chunk
    if tl.load(found_inf) != 0.0:
        tl.store(row, 0.0)
        tl.store(row + num_chunks, tl.sum(p * p, axis=0).to(tl.float64))
        tl.store(
            row + 2 * num_chunks, tl.sum(tl.where(tl.abs(p) < float("inf"), 0.0, 1.0), axis=0).to(tl.float64)
        )
    else:
        g_start = tl.load(starts + num_segments + segment) + offset
        m_start = tl.load(starts + 2 * num_segments + segment) + offset
        v_start = tl.load(starts + 3 * num_segments + segment) + offset
        g = _load(g_base, g_start, lane, length, BLOCK, ALIGNED)
        m = _load(m_base, m_start, lane, length, BLOCK, ALIGNED)
        v = _load(v_base, v_start, lane, length, BLOCK, ALIGNED)
        g = tl.div_rn(g, tl.load(grad_scale))
        # Where beta is 1/2 and more, 1 - beta is exact, and this is torch's fma(-beta, g, g) to the bit.
        m = tl.fma(beta1, m, (1.0 - beta1) * g)
        v = tl.fma(beta2, v, (1.0 - beta2) * (g * g))
        denominator = tl.div_rn(tl.sqrt_rn(v), tl.load(corrections + 2 * segment + 1)) + eps
        step_size = tl.div_rn(lr, tl.load(corrections + 2 * segment))
        decayed = p - lr * weight_decay * p
        new = _rounded(decayed - tl.div_rn(step_size * m, denominator), p_base.dtype.element_ty)
        m_new = _rounded(m, m_base.dtype.element_ty)
        v_new = _rounded(v, v_base.dtype.element_ty)
        _store(p_base, p_start, new, lane, length, BLOCK, ALIGNED)
        _store(m_base, m_start, m_new, lane, length, BLOCK, ALIGNED)
        _store(v_base, v_start, v_new, lane, length, BLOCK, ALIGNED)
        weights = tl.where(inside, _widened(new), 0.0)
        change = tl.where(inside, weights - p, 0.0)
        is_finite = (tl.abs(weights) < float("inf")) & (tl.abs(_widened(m_new)) < float("inf"))
        is_finite = is_finite & (_widened(v_new) < float("inf"))
        num_bad = tl.sum(tl.where(is_finite, 0.0, 1.0), axis=0)
        tl.store(row, tl.sum(change * change, axis=0).to(tl.float64))
        tl.store(row + num_chunks, tl.sum(weights * weights, axis=0).to(tl.float64))
        tl.store(row + 2 * num_chunks, num_bad.to(tl.float64))


@triton.jit(do_not_specialize=["num_chunks"])  # type: ignore[untyped-decorator]
def _add_chunks(partial, first_chunk, result, num_chunks, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """result[segment] = its columns of `partial`, added up in a fixed order."""
    segment = tl.program_id(0)
    first, last = tl.load(first_chunk + segment), tl.load(first_chunk + segment + 1)
    column = tl.arange(0, 4)
    total = tl.zeros([4, ROWS], tl.float64)
    for start in range(first, last, ROWS):
        chunk = start + tl.arange(0, ROWS)
        inside = (column < 3)[:, None] & (chunk < last)[None, :]
        total += tl.load(partial + column[:, None] * num_chunks + chunk[None, :], mask=inside, other=0.0)
    tl.store(result + segment * 3 + column, tl.sum(total, axis=1), mask=column < 3)
