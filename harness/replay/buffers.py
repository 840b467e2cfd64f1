"""A model's buffers, copied and put back: each rank has its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Buffers", "restore_buffers", "saved_buffers"]

Buffers = dict[str, Tensor]
"""Copies of a model's buffers, those that are not saved in checkpoints too, by name."""


def saved_buffers(model: nn.Module) -> Buffers:
    """Copies of all buffers."""
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


@torch.no_grad()
def restore_buffers(model: nn.Module, saved: Buffers) -> None:
    """Writes what `saved_buffers` gave; a buffer that has another shape now is replaced."""
    for name, buffer in model.named_buffers():
        values = saved.get(name)
        if values is None:
            continue
        if buffer.shape == values.shape and buffer.dtype == values.dtype:
            buffer.copy_(values)
        else:
            path, _, last = name.rpartition(".")
            setattr(model.get_submodule(path), last, values.clone())
