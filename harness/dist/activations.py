"""Activation checkpointing: a block's activations are computed again in the backward pass instead of kept.

Torch's own non-reentrant checkpoint, which restores the generators of random numbers and autocast before it
computes a block again. What it does not restore are buffers: a block that updates them, as running statistics, would
be computed again from other values than before, and take in each batch twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import create_selective_checkpoint_contexts

__all__ = ["checkpoint_activations"]

_Contexts = tuple[AbstractContextManager[object], AbstractContextManager[object]]

_aten = torch.ops.aten
KEPT = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten._grouped_mm.default,
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
    modules = dict(model.named_modules(remove_duplicate=False))  # a block may stand in several places
    for path, module in modules.items():
        if module in wrapper_of:
            parent, _, name = path.rpartition(".")
            setattr(modules[parent], name, wrapper_of[module])
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
    changed: list[_Buffer] = []
    return _noting_changes(block, forward, changed), _as_before(block, again, changed)


@dataclass(frozen=True, slots=True)
class _Buffer:
    """A buffer as it was."""

    owner: nn.Module
    name: str
    tensor: Tensor
    version: int
    value: Tensor
    """A copy."""

    @property
    def is_changed(self) -> bool:
        """Written to, or replaced by another tensor. Does not synchronise."""
        return getattr(self.owner, self.name) is not self.tensor or self.tensor._version != self.version

    def put_back(self) -> None:
        if getattr(self.owner, self.name) is not self.tensor:
            setattr(self.owner, self.name, self.tensor)
        # `data` has a version of its own: what has saved the tensor for a backward pass gets back what it saved.
        self.tensor.data.copy_(self.value)


def _buffers(block: nn.Module) -> list[_Buffer]:
    return [
        _Buffer(owner, name, tensor, tensor._version, tensor.detach().clone())
        for owner in block.modules()
        for name, tensor in owner.named_buffers(recurse=False)
    ]


@contextmanager
def _noting_changes(
    block: nn.Module, inner: AbstractContextManager[object], changed: list[_Buffer]
) -> Iterator[None]:
    """Within it `block` is computed first. The buffers that this changes are kept in `changed`, as they were before.

    All those of a module of which one is changed: batch_norm counts what it does to `num_batches_tracked` as a new
    version, and not what it does to its statistics.
    """
    before = _buffers(block)
    with inner:
        yield
    owners = {one.owner for one in before if one.is_changed}
    changed += [one for one in before if one.owner in owners]


@contextmanager
def _as_before(
    block: nn.Module, inner: AbstractContextManager[object], changed: Sequence[_Buffer]
) -> Iterator[None]:
    """Within it `block` is computed again, from the buffers as they were; afterwards they are as they are now."""
    present = _buffers(block)
    for one in changed:
        one.put_back()
    try:
        with inner:
            yield
    finally:
        for one in present:
            one.put_back()
