"""A model's state under the names of the model itself, whatever is wrapped around it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from harness.wrappers import without_wrappers

__all__ = ["as_named_by", "bare_state", "nonfinite_tensors"]


def bare_state(model: Any) -> dict[str, Any]:
    """The state dict without what DDP, `DataParallel`, `torch.compile` and activation checkpointing add to
    its names. A child of the model's own that is called `module` keeps its name."""
    state = model if isinstance(model, Mapping) else model.state_dict()
    inner = _inner_prefixes(model)
    return {_bare(name, inner): value for name, value in state.items()}


def as_named_by(state: Mapping[str, Any], model: nn.Module | None, *, is_bare: bool) -> dict[str, Any]:
    """A saved state under the names that `model`, wrapped or not, has; without a model under bare ones.

    Args:
        is_bare: Whether it was saved by `bare_state`. Earlier releases kept the wrappers' prefixes.
    """
    bare = dict(state) if is_bare else {_bare(name): value for name, value in state.items()}
    if not is_bare and bare and all(name.startswith("module.") for name in bare):
        bare = {name.removeprefix("module."): value for name, value in bare.items()}
    if model is None:
        return bare
    inner = _inner_prefixes(model)
    names = {_bare(name, inner): name for name in model.state_dict()}
    if not is_bare and names.keys() <= {_bare(name) for name in state}:  # a child of its own called `module`
        bare = {_bare(name): value for name, value in state.items()}
    return {names.get(name, name): value for name, value in bare.items()}


def nonfinite_tensors(state: Any) -> list[str]:
    """Names of the tensors in a nested state of which an element is NaN or infinite, in this rank's part.

    Reads every floating tensor once; one synchronisation for each device.
    """
    named = [(name, tensor) for name, tensor in _tensors(state) if _can_be_nonfinite(tensor)]
    names: list[str] = []
    for device in {tensor.device for _, tensor in named}:
        here = [(name, tensor) for name, tensor in named if tensor.device == device]
        finite = torch.stack([tensor.isfinite().all() for _, tensor in here]).tolist()
        names += [name for (name, _), is_finite in zip(here, finite, strict=True) if not is_finite]
    return names


def _inner_prefixes(model: Any) -> list[str]:
    """What stands before the names of the modules that DDP and `DataParallel` wrap, innermost first."""
    if not isinstance(model, nn.Module):
        return []
    wrappers = (DistributedDataParallel, DataParallel)
    prefixes = [f"{name}." if name else "" for name, m in model.named_modules() if isinstance(m, wrappers)]
    return sorted(prefixes, key=len, reverse=True)


def _bare(name: str, inner: list[str] | None = None) -> str:
    for prefix in inner or ():
        if name.startswith(f"{prefix}module."):
            name = prefix + name.removeprefix(f"{prefix}module.")
    return without_wrappers(name)


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        local = value.detach()
        yield name, local.to_local() if hasattr(local, "to_local") else local
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{name}/{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _tensors(item, f"{name}/{index}")


def _can_be_nonfinite(tensor: torch.Tensor) -> bool:
    is_wide = (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype.itemsize > 1
    return is_wide and tensor.device.type != "meta" and tensor.layout == torch.strided
