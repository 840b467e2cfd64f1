"""Files of tensor data: written in one stream while they are checksummed, read in pieces.

A shard is a safetensors file, so that any tool can look into it; where an element lies is known from the
manifest, and the header is never read back.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import xxhash

from harness.checkpoint.layout import ShardLayout
from harness.checkpoint.manifest import Damaged, ShardFile
from harness.files import file_status, open_file

__all__ = ["check_file", "read_elements", "write_file", "write_shard"]

_PIECE_BYTES = 8 << 20
"""Written and checksummed at a time: large for the disk, small for the cache."""
_FLUSHED_BYTES = 256 << 20
"""Flushed to the disk at a time: a write only says that the page cache has taken it."""


def write_shard(
    path: Path, layout: ShardLayout, data: torch.Tensor, wrote: Callable[[int], None] | None = None
) -> ShardFile:
    """Writes the bytes `data`, laid out as `layout` says, to `path` and flushes them to the disk.

    Args:
        wrote: As for `write_file`.

    Raises:
        OSError: the disk is full, gone or read-only.
    """
    return write_file(path, [layout.header, data.numpy().data], wrote)


def write_file(
    path: Path, parts: Sequence[bytes | memoryview], wrote: Callable[[int], None] | None = None
) -> ShardFile:
    """Creates `path` with the concatenated `parts` and flushes it to the disk; gives size and checksum.

    Args:
        wrote: Told of every few bytes that the disk has taken.

    Raises:
        OSError: the disk is full, gone or read-only, or the file exists.
    """
    checksum, size_bytes, flushed_bytes = xxhash.xxh3_128(), 0, 0
    with open(path, "xb", buffering=0) as file:
        for part in parts:
            for piece in _pieces(memoryview(part)):
                checksum.update(piece)
                while piece:
                    written = file.write(piece)
                    size_bytes += written
                    piece = piece[written:]
                    if wrote is not None:
                        wrote(written)
                if size_bytes - flushed_bytes >= _FLUSHED_BYTES:
                    os.fsync(file.fileno())
                    flushed_bytes = size_bytes
        os.fsync(file.fileno())
    return ShardFile(size_bytes=size_bytes, xxh3_128=checksum.hexdigest())


def check_file(path: Path, expected: ShardFile) -> None:
    """Reads the file once and compares its size and checksum.

    Raises:
        Damaged: it is missing, unreadable or not as it was written.
    """
    try:
        size_bytes = file_status(path).st_size
        if size_bytes != expected.size_bytes:
            raise Damaged(f"{path.name} has {size_bytes} bytes instead of {expected.size_bytes}")
        digest = _digest(path)
    except OSError as error:
        raise Damaged(f"{path.name} cannot be read: {error.strerror}") from error
    if digest != expected.xxh3_128:
        raise Damaged(f"{path.name} is damaged: its checksum is {digest}, not {expected.xxh3_128}")


def read_elements(path: Path, dtype: torch.dtype, start: int, count: int) -> torch.Tensor:
    """`count` elements from byte `start` on, as a flat tensor on the CPU.

    Raises:
        Damaged: the file is shorter, or cannot be read.
    """
    size_bytes = count * dtype.itemsize
    try:
        elements = np.fromfile(path, dtype=np.uint8, count=size_bytes, offset=start)
    except OSError as error:
        raise Damaged(f"{path.name} cannot be read: {error.strerror}") from error
    if elements.size != size_bytes:
        raise Damaged(f"{path.name} ends before byte {start + size_bytes}")
    return torch.from_numpy(elements).view(dtype)


def _pieces(view: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(view), _PIECE_BYTES):
        yield view[start : start + _PIECE_BYTES]


def _digest(path: Path) -> str:
    checksum = xxhash.xxh3_128()
    piece = bytearray(_PIECE_BYTES)
    with open_file(path) as file:
        while length := file.readinto(piece):
            checksum.update(memoryview(piece)[:length])
    return checksum.hexdigest()
