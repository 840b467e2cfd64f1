"""How a model is spread over the processes: plain, DDP or FSDP2."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from harness.config import ParallelConfig
from harness.dist.world import World

__all__ = ["distribute", "gradient_sync", "plain"]


def distribute(model: nn.Module, parallel: ParallelConfig, world: World) -> nn.Module:
    """Moves `model` to the world's device and wraps it as configured.

    FSDP2 shards by the blocks in the model's outermost `ModuleList`s, which is where repeated layers stand, and
    then the rest as a whole; the model is changed in place.
    """
    _move(model, world.device)
    if parallel.strategy == "fsdp":
        return _shard(model)
    if world.world_size == 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[world.device] if world.device.type == "cuda" else None,
        bucket_cap_mb=parallel.bucket_cap_mb,
        find_unused_parameters=parallel.find_unused,
        gradient_as_bucket_view=True,
    )


@contextmanager
def gradient_sync(model: nn.Module, *, on: bool) -> Iterator[None]:
    """Within it a backward pass reduces gradients over the ranks, or only adds them up locally."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(on)
        yield
    elif isinstance(model, DistributedDataParallel) and not on:
        with model.no_sync():
            yield
    else:
        yield


def plain(model: nn.Module) -> nn.Module:
    """The model itself, without DDP around it; FSDP2 has no wrapper."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def _move(model: nn.Module, device: torch.device) -> None:
    """Tensors without data, which memory is forecast with, cannot be moved: what is there already is left alone."""
    if any(tensor.device != device for tensor in itertools.chain(model.parameters(), model.buffers())):
        model.to(device)


def _shard(model: nn.Module) -> nn.Module:
    mesh = torch.distributed.device_mesh.init_device_mesh(
        next(model.parameters()).device.type, (torch.distributed.get_world_size(),)
    )
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if isinstance(model, FSDPModule) and hasattr(model, "set_reduce_scatter_unused_params"):  # torch 2.13
        # Else ranks that used different experts of a mixture would reduce buffers of different sizes.
        model.set_reduce_scatter_unused_params(True)
    return model


def _blocks(model: nn.Module) -> list[nn.Module]:
    """What is sharded as a unit: each module in a `ModuleList` that is in no other unit.

    Lists inside a block, such as its experts, belong to the block: a rank on which an expert gets no token would
    not call it, and units have to be called in the same order on all ranks. So does what shares a parameter
    with the rest of the model, which would find it sharded.
    """
    owners: dict[nn.Parameter, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, set()).add(module)

    def is_closed(block: nn.Module) -> bool:
        inside = set(block.modules())
        return all(owners[parameter] <= inside for parameter in block.parameters())

    found: dict[nn.Module, None] = {}
    todo = [model]
    while todo:
        module = todo.pop()
        for child in module.children():
            is_container = isinstance(child, nn.ModuleList | nn.ModuleDict)
            if isinstance(module, nn.ModuleList) and not is_container and is_closed(child):
                if next(child.parameters(), None) is not None:
                    found[child] = None
            else:
                todo.append(child)
    return list(found)
