"""Passes over large host memory that neither wait for other threads nor take the cores from training.

torch spreads every operation on the CPU over all cores and waits for the last one. Over hundreds of tensors,
on a machine that is busy with something else too, that waiting took ten times as long as the copying.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["copy_to_host", "is_finite"]

_PIECE_BYTES = 16 << 20
_MAX_THREADS = 8
"""More do not copy faster."""

_CHECKED_ELEMENTS = 1 << 18
"""Looked at in one go; small enough for the cache."""

Bytes = npt.NDArray[np.uint8]


def copy_to_host(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copies the second of each pair, wherever it is, to the first: contiguous, on the host, of equal shape.

    Returns when everything is there; synchronises with the GPU if anything came from one.
    """
    pieces: list[tuple[Bytes, Bytes]] = []
    on_gpu = False
    for target, source in pairs:
        if source.is_cuda:
            target.copy_(source, non_blocking=True)
            on_gpu = True
        else:
            pieces.extend(_pieces(target, source))
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        # Each piece is one memcpy without the interpreter's lock.
        list(pool.map(lambda piece: np.copyto(*piece), pieces))
    if on_gpu:
        torch.cuda.current_stream().synchronize()


def is_finite(tensor: torch.Tensor, *, or_infinite: bool = False) -> bool:
    """Whether a contiguous tensor on the host, real or complex, has neither NaN nor infinity in it.

    With `or_infinite`: whether it has no NaN.

    Reads the bits, on one thread: without its sign, a number that is not finite is at least infinity.
    """
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.dtype.itemsize == 1:  # types of 8 bits do not agree on what is NaN
        tensor = tensor.float()
    word = np.dtype(f"u{tensor.dtype.itemsize}")
    infinity = _bytes(torch.tensor(float("inf"), dtype=tensor.dtype)).view(word)[0]
    smallest_bad = infinity + 1 if or_infinite else infinity
    without_sign = np.array((1 << (8 * word.itemsize - 1)) - 1, dtype=word)
    bits = _bytes(tensor).view(word)
    for start in range(0, bits.size, _CHECKED_ELEMENTS):
        if (bits[start : start + _CHECKED_ELEMENTS] & without_sign).max() >= smallest_bad:
            return False
    return True


def _pieces(target: torch.Tensor, source: torch.Tensor) -> Iterator[tuple[Bytes, Bytes]]:
    targets, sources = _bytes(target), _bytes(source.contiguous())
    for start in range(0, targets.size, _PIECE_BYTES):
        yield targets[start : start + _PIECE_BYTES], sources[start : start + _PIECE_BYTES]


def _bytes(tensor: torch.Tensor) -> Bytes:
    array: Bytes = tensor.detach().view(-1).view(torch.uint8).numpy()
    return array
