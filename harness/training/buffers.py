"""Buffers during an evaluation: as a checkpoint of this moment holds them, and afterwards as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from harness.dist import broadcast_from_main, local_part

__all__ = ["buffers_of_rank_0", "constant_buffers"]

_LARGE_BYTES = 1 << 16
_MAX_COPIED_BYTES = 1 << 30
"""Large buffers of more than this in all (quantised weights) are taken for constants, as the guard does."""

_INTEGER_OF = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer type by bytes per element: values are moved as bits."""


@contextmanager
def buffers_of_rank_0(model: nn.Module) -> Iterator[None]:
    """Within it the buffers that a checkpoint holds have rank 0's values; afterwards all have their own back.

    Nothing that is written here counts as a change (`Tensor._version`). Left as they are: `constant_buffers`,
    and tensors that cannot be written through, such as expanded ones, inference tensors and subclasses.
    """
    tables = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    constants = set(map(id, constant_buffers(model).values()))
    writable = [one for one in _writable_buffers(model) if id(one.buffer) not in constants]
    copies = [one.bits.clone() for one in writable]
    # Of a DTensor every rank holds its own part.
    broadcast_from_main(one.bits for one in writable if one.is_saved and not isinstance(one.buffer, DTensor))
    try:
        yield
    finally:
        for table, before in tables:
            table.clear()  # of what was registered, or put in the place of another, meanwhile
            table.update(before)
        for one, copy in zip(writable, copies, strict=True):
            one.bits.copy_(copy)


def constant_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Those of 64 KiB and more, by name, if they have more than 1 GiB in all: too much to be copied."""
    large = [one for one in _writable_buffers(model) if one.bits.nbytes >= _LARGE_BYTES]
    if sum(one.bits.nbytes for one in large) <= _MAX_COPIED_BYTES:
        return {}
    return {one.name: one.buffer for one in large}


@dataclass(frozen=True, slots=True)
class _Buffer:
    """A buffer that can be written through."""

    name: str
    buffer: Tensor
    bits: Tensor
    is_saved: bool


def _writable_buffers(model: nn.Module) -> list[_Buffer]:
    """Each once."""
    found: dict[int, _Buffer] = {}
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            bits = None if buffer is None else _bits(buffer)
            if buffer is None or bits is None:
                continue
            is_saved = name not in module._non_persistent_buffers_set
            earlier = found.get(id(buffer))
            if earlier is None or (is_saved and not earlier.is_saved):
                found[id(buffer)] = _Buffer(f"{path}.{name}".lstrip("."), buffer, bits, is_saved)
    return list(found.values())


def _bits(buffer: Tensor) -> Tensor | None:
    """As integers in the buffer's own memory, with a version counter of their own; of a DTensor this rank's
    part. None: they cannot be written through."""
    local = local_part(buffer)
    is_plain = type(local) in (Tensor, nn.Parameter) and local.layout == torch.strided
    if not is_plain or local.is_quantized or local.is_meta or local.is_inference():
        return None
    if local.is_conj() or local.is_neg() or not local.numel():
        return None
    if any(step == 0 and size > 1 for step, size in zip(local.stride(), local.shape, strict=True)):
        return None
    values = torch.view_as_real(local.data) if local.is_complex() else local.data
    integer = _INTEGER_OF.get(values.element_size())
    return None if integer is None else values.view(integer)
