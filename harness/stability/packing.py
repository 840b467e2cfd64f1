"""Several tensors in one message: for the step's one gather and for its one copy to the host."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["Packet", "Spec", "can_be_gathered", "pack", "unpack"]

Packet = dict[str, Tensor]
"""Tensors of float64 or int64 by name."""

Spec = dict[str, tuple[torch.Size, torch.dtype]]
"""What a packed packet consists of, in order."""


MOST_GATHERED_BYTES = 256 << 20
"""On each device, and then on each host."""


def can_be_gathered(num_values: int, *, num_ranks: int) -> bool:
    """Whether so many float64 of each rank are few enough to be on every rank."""
    return 8 * num_values * num_ranks <= MOST_GATHERED_BYTES


def pack(packet: Mapping[str, Tensor]) -> tuple[Tensor, Spec]:
    """All tensors as one `[n]` of float64 whose bits are theirs, and how to take it apart again."""
    flat = torch.cat([tensor.reshape(-1).view(torch.float64) for tensor in packet.values()])
    return flat, {name: (tensor.shape, tensor.dtype) for name, tensor in packet.items()}


def unpack(flat: Tensor, spec: Spec) -> Packet:
    """The tensors in `flat`, `[..., n]`; each gets the leading dimensions of `flat` before its own."""
    sizes = [math.prod(shape) for shape, _ in spec.values()]
    pieces = flat.split(sizes, dim=-1)
    return {
        name: piece.view(dtype).reshape(*flat.shape[:-1], *shape)
        for (name, (shape, dtype)), piece in zip(spec.items(), pieces, strict=True)
    }
