"""Activation checkpointing: a block's activations are computed again in the backward pass instead of kept.

Torch's own non-reentrant checkpoint, which restores the generators of random numbers and autocast before it
computes a block again. What it does not restore are buffers: running statistics would take in each batch twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import create_selective_checkpoint_contexts

__all__ = ["checkpoint_activations"]

_Contexts = tuple[AbstractContextManager[object], AbstractContextManager[object]]

_aten = torch.ops.aten
KEPT = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten.convolution.default,
    _aten._scaled_mm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
]
"""Of selective checkpointing: what takes long to compute, and whose results are small beside what lies between."""


def checkpoint_activations(
    model: nn.Module, blocks: Sequence[nn.Module], how: Literal["selective", "full"]
) -> list[nn.Module]:
    """Puts torch's wrapper around each of `blocks` wherever it stands in `model`, in place; gives the wrappers.

    To be called before blocks are compiled and sharded, which is then done to the wrappers: what is computed again
    is within the compiled code, and finds its parameters gathered.
    """
    wrapper_of: Mapping[nn.Module, nn.Module] = {block: _wrapped(block, how) for block in blocks}
    for parent in list(model.modules()):
        if parent not in wrapper_of.values():
            for name, child in list(parent.named_children()):
                if child in wrapper_of:
                    setattr(parent, name, wrapper_of[child])
    return list(wrapper_of.values())


def _wrapped(block: nn.Module, how: str) -> nn.Module:
    contexts: Callable[[], _Contexts] | None = None
    if how == "selective":
        contexts = functools.partial(create_selective_checkpoint_contexts, KEPT)
    if next(block.buffers(), None) is not None:
        contexts = functools.partial(_contexts_for, block, contexts)
    settings: dict[str, Any] = {} if contexts is None else {"context_fn": contexts}
    return checkpoint_wrapper(block, preserve_rng_state=True, **settings)


def _contexts_for(block: nn.Module, inner: Callable[[], _Contexts] | None) -> _Contexts:
    forward, again = (nullcontext(), nullcontext()) if inner is None else inner()
    return forward, _keeping_buffers(block, again)


@contextmanager
def _keeping_buffers(block: nn.Module, inner: AbstractContextManager[object]) -> Iterator[None]:
    """Within it `block` is computed again; what that does to its buffers is undone. Does not synchronise."""
    # All of them: batch_norm writes to its statistics without counting it as a new version.
    kept = [(buffer, buffer.clone()) for buffer in block.buffers()]
    try:
        with inner:
            yield
    finally:
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)
