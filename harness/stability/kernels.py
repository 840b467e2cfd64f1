"""Gradient statistics as two Triton kernels: one read of the gradients, no float atomics, no synchronisation.

Stage 1, a program per chunk: a row of partial results. Stage 2, a program per segment: its chunks' rows in a
fixed order. So the same gradients give the same bits every time.

Elements are widened to fp32 at the load. A finite sum of squares proves that a chunk holds neither NaN nor
Inf, and with a max-abs of ordinary size it is the result. Otherwise the finite elements are scaled by a power
of two chosen by their max-abs, and leave the program unscaled in float64: neither can squares of finite
elements overflow nor those of tiny ones vanish. `reference.py` is the specification.

This module imports `triton`: import it where there is a CUDA device, or with `TRITON_INTERPRET=1`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from harness.stability.chunks import ALIGNMENT, ChunkTable, chunk_table
from harness.stability.layout import MAX_ABS, NUM_COLUMNS, NUM_INF, NUM_NAN, NUM_ZERO, SUM_SQUARES
from harness.stability.reference import flattened

__all__ = ["BLOCK", "bucket_statistics", "launch", "tensor_statistics"]

BLOCK = 8192
"""Elements per chunk."""

WARPS = {4: 2, 2: 1}
"""Warps per chunk, by an element's bytes. Few: many loads in flight for each thread, little to combine
between them: the fastest of 1, 2, 4 and 8 on an H200."""

ROWS_AT_ONCE = 512
"""Chunks that stage 2 adds at once."""

_ALIGNMENT = tl.constexpr(ALIGNMENT)
_SUM_SQUARES, _MAX_ABS = tl.constexpr(SUM_SQUARES), tl.constexpr(MAX_ABS)
_NUM_NAN, _NUM_INF, _NUM_ZERO = tl.constexpr(NUM_NAN), tl.constexpr(NUM_INF), tl.constexpr(NUM_ZERO)
_NUM_COLUMNS = tl.constexpr(NUM_COLUMNS)
# Powers of two, so that scaling is exact. Of values in (2^-45, 2^50) the squares of up to 2^27 can be added
# in fp32 as they are; scaled, the largest fp32 becomes 2^48 and the least denormal one 2^-59.
_TINY, _TINY_SCALE = tl.constexpr(2.0**-45), tl.constexpr(2.0**90)
_HUGE, _HUGE_SCALE = tl.constexpr(2.0**50), tl.constexpr(2.0**-80)


def bucket_statistics(
    flat: Tensor, sizes: Sequence[int], *, extremes: bool = True, block: int = BLOCK
) -> Tensor:
    """Statistics of consecutive segments of a flat buffer: `[len(sizes), 5]` float64 on its device."""
    starts = (0, *itertools.accumulate(sizes))[: len(sizes)]
    table = _cached_table(starts, tuple(sizes), block, flat.device, _stream(flat.device), item_bytes=1)
    return launch(flattened(flat), table, extremes=extremes, block=block)


def tensor_statistics(tensors: Sequence[Tensor], *, extremes: bool = True, block: int = BLOCK) -> Tensor:
    """Statistics of tensors that share no buffer: `[len(tensors), 5]` float64 on their device.

    One launch per dtype. The table of addresses is made anew only when an address or a size changes.
    """
    if not tensors:
        return torch.zeros(0, NUM_COLUMNS, dtype=torch.float64)
    dtypes = dict.fromkeys([tensor.dtype for tensor in tensors])
    if len(dtypes) == 1:
        return _same_dtype_statistics(tensors, extremes, block)
    rows: dict[int, Tensor] = {}
    for dtype in dtypes:
        places = [place for place, tensor in enumerate(tensors) if tensor.dtype == dtype]
        table = _same_dtype_statistics([tensors[place] for place in places], extremes, block)
        rows.update(zip(places, table.unbind(), strict=True))
    return torch.stack([rows[place] for place in range(len(tensors))])


def _same_dtype_statistics(tensors: Sequence[Tensor], extremes: bool, block: int) -> Tensor:
    """Addresses are given to the kernel as distances, in elements, from the lowest tensor.

    Hundreds of tensors are a part of a step's host time, so each is asked little, and by maps.
    """
    if not all(map(Tensor.is_contiguous, tensors)):
        tensors = [flattened(tensor) for tensor in tensors]
    addresses, sizes = tuple(map(Tensor.data_ptr, tensors)), tuple(map(Tensor.numel, tensors))
    base = tensors[addresses.index(min(addresses))]
    stream = _stream(base.device)
    table = _cached_table(addresses, sizes, block, base.device, stream, item_bytes=base.element_size())
    return launch(base.detach().view(-1), table, extremes=extremes, block=block)


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@functools.lru_cache(maxsize=256)
def _cached_table(
    addresses: tuple[int, ...],
    sizes: tuple[int, ...],
    block: int,
    device: torch.device,
    stream: int,
    *,
    item_bytes: int,
) -> ChunkTable:
    """A table belongs to the stream that it was copied on: another one might read it before it is there."""
    origin = min(addresses, default=0)
    starts = [(address - origin) // item_bytes for address in addresses]
    return chunk_table(starts, sizes, block=block).to(device)


def launch(base: Tensor, table: ChunkTable, *, extremes: bool, block: int) -> Tensor:
    """Measures the segments of `table`, whose indices count elements from the start of `base`."""
    warps = WARPS[base.element_size()]
    if base.dtype == torch.bfloat16:
        base = base.view(
            torch.int16
        )  # bf16 is the upper half of fp32: widened by a shift, denormals included
    num_chunks, num_segments = len(table.starts), len(table.first_chunk) - 1
    partial = torch.empty(NUM_COLUMNS, num_chunks, dtype=torch.float64, device=base.device)
    result = torch.empty(num_segments, NUM_COLUMNS, dtype=torch.float64, device=base.device)
    with torch.cuda.device_of(base):
        if num_chunks:
            _measure_chunk[(num_chunks,)](
                base, table.starts, table.lengths, partial, num_chunks, BLOCK=block, num_warps=warps
            )
        if num_segments:
            _add_chunks[(num_segments,)](
                partial, table.first_chunk, result, num_chunks, EXTREMES=extremes, ROWS=ROWS_AT_ONCE
            )
    return result


@triton.jit
def _widened(raw):  # type: ignore[no-untyped-def]
    """As fp32; int16 stands for the bits of bf16."""
    if raw.dtype == tl.int16:
        values = (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        values = raw.to(tl.float32)
    return values


@triton.jit(do_not_specialize=["num_chunks"])  # type: ignore[untyped-decorator]
def _measure_chunk(  # type: ignore[no-untyped-def]
    base, starts, lengths, partial, num_chunks, BLOCK: tl.constexpr
):
    """partial[:, chunk] = statistics of base[start : start + length]."""
    chunk = tl.program_id(0)
    start, length = tl.load(starts + chunk), tl.load(lengths + chunk)
    lane = tl.arange(0, BLOCK)
    if length == BLOCK:
        # A full chunk is aligned, and the compiler can see it: unmasked vector loads.
        raw = tl.load(base + start // _ALIGNMENT * _ALIGNMENT + lane)
    else:
        raw = tl.load(base + start + lane, mask=lane < length, other=0)
    values = _widened(raw)
    # What is masked out was loaded as 0. Counted in floats, which are exact here and spare the integer units.
    num_zero = tl.sum(tl.where(values == 0.0, 1.0, 0.0), axis=0) - (BLOCK - length).to(tl.float32)
    num_nan, num_inf = num_zero * 0.0, num_zero * 0.0
    max_abs = tl.max(tl.abs(values), axis=0)
    in_fp32 = tl.sum(values * values, axis=0)
    sum_squares = in_fp32.to(tl.float64)
    is_ordinary = (max_abs == 0.0) | ((max_abs >= _TINY) & (max_abs <= _HUGE))
    if (in_fp32 < float("inf")) & is_ordinary:
        pass
    else:
        # Read once more rather than kept: this is rare, and registers are what limits the reading.
        again = _widened(tl.load(base + start + lane, mask=lane < length, other=0))
        magnitude = tl.abs(again)
        finite = tl.where(magnitude < float("inf"), magnitude, 0.0)
        max_abs = tl.max(finite, axis=0)
        scale = tl.where(max_abs < _TINY, _TINY_SCALE, tl.where(max_abs > _HUGE, _HUGE_SCALE, 1.0))
        scaled = finite * scale
        unscale = 1.0 / scale.to(tl.float64)
        sum_squares = tl.sum(scaled * scaled, axis=0).to(tl.float64) * unscale * unscale
        num_nan = tl.sum(tl.where(again != again, 1.0, 0.0), axis=0)
        num_inf = tl.sum(tl.where(magnitude == float("inf"), 1.0, 0.0), axis=0)

    row = partial + chunk
    tl.store(row + _SUM_SQUARES * num_chunks, sum_squares)
    tl.store(row + _MAX_ABS * num_chunks, max_abs.to(tl.float64))
    tl.store(row + _NUM_NAN * num_chunks, num_nan.to(tl.float64))
    tl.store(row + _NUM_INF * num_chunks, num_inf.to(tl.float64))
    tl.store(row + _NUM_ZERO * num_chunks, num_zero.to(tl.float64))


@triton.jit(do_not_specialize=["num_chunks"])  # type: ignore[untyped-decorator]
def _add_chunks(  # type: ignore[no-untyped-def]
    partial, first_chunk, result, num_chunks, EXTREMES: tl.constexpr, ROWS: tl.constexpr
):
    """result[segment] = its columns of `partial` added up, or their maximum where the column is one."""
    segment = tl.program_id(0)
    first, last = tl.load(first_chunk + segment), tl.load(first_chunk + segment + 1)
    column = tl.arange(0, 8)
    total = tl.zeros([8, ROWS], tl.float64)
    for start in range(first, last, ROWS):
        chunk = start + tl.arange(0, ROWS)
        inside = (column < _NUM_COLUMNS)[:, None] & (chunk < last)[None, :]
        part = tl.load(partial + column[:, None] * num_chunks + chunk[None, :], mask=inside, other=0.0)
        total = tl.where((column == _MAX_ABS)[:, None], tl.maximum(total, part), total + part)
    values = tl.where(column == _MAX_ABS, tl.max(total, axis=1), tl.sum(total, axis=1))
    if not EXTREMES:
        values = tl.where((column == _MAX_ABS) | (column == _NUM_ZERO), float("nan"), values)
    tl.store(result + segment * _NUM_COLUMNS + column, values, mask=column < _NUM_COLUMNS)
