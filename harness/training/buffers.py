"""A model's buffers, copied and put back: after an evaluation, and after passes that are made again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from harness.dist import broadcast_from_main, local_part

__all__ = ["SavedBuffers", "buffers_of_rank_0", "constant_buffers"]

_LARGE_BYTES = 1 << 16
_MAX_COPIED_BYTES = 1 << 30
"""Large buffers of more than this in all (quantised weights) are taken for constants, as the guard does."""

_INTEGER_OF = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer type by bytes per element: values are moved as bits."""


class SavedBuffers:
    """A model's buffers as they are now: which tensors they are, and their values.

    Nothing that is written here counts as a change (`Tensor._version`). Left as they are: the values of
    `constant_buffers`, and of tensors that cannot be written through, such as expanded ones, inference
    tensors and subclasses. Does not synchronise.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tables = [(module._buffers, dict(module._buffers)) for module in model.modules()]
        constants = set(map(id, constant_buffers(model).values()))
        self._writable = [one for one in _writable_buffers(model) if id(one.buffer) not in constants]
        self._copies = [one.bits.clone() for one in self._writable]

    @property
    def of_checkpoints(self) -> list[Tensor]:
        """The bits, in their place, of those that a checkpoint holds; of a DTensor every rank has its own."""
        return [one.bits for one in self._writable if one.is_saved and not isinstance(one.buffer, DTensor)]

    def take_from_main(self) -> None:
        """Takes rank 0's values instead, as DDP does before a step's first forward pass. All ranks call it
        together: a collective."""
        broadcast_from_main(self._copies)

    def have_changed(self) -> bool:
        """Whether buffers or values are others now. Reads them on the host."""
        if any(table.get(name) is not one for table, before in self._tables for name, one in before.items()):
            return True
        pairs = zip(self._writable, self._copies, strict=True)
        return any(not torch.equal(one.bits, copy) for one, copy in pairs)

    def put_back(self) -> None:
        """Makes buffers and their values what they were; may be done again."""
        for table, before in self._tables:
            table.clear()  # of what was registered, or put in the place of another, meanwhile
            table.update(before)
        for one, copy in zip(self._writable, self._copies, strict=True):
            one.bits.copy_(copy)


@contextmanager
def buffers_of_rank_0(model: nn.Module) -> Iterator[None]:
    """Within it the buffers that a checkpoint holds have rank 0's values; afterwards all have their own back
    (`SavedBuffers`)."""
    saved = SavedBuffers(model)
    broadcast_from_main(saved.of_checkpoints)
    try:
        yield
    finally:
        saved.put_back()


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
