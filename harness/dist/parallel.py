"""How a model is spread over the processes: plain, DDP or FSDP2."""

from __future__ import annotations

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

    FSDP2 shards by the blocks in the model's `ModuleList`s, which is where repeated layers stand, and then
    the rest as a whole; the model is changed in place.
    """
    model = model.to(world.device)
    if parallel.strategy == "fsdp":
        return _shard(model)
    if world.world_size == 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[world.device] if world.device.type == "cuda" else None,
        bucket_cap_mb=parallel.bucket_cap_mb,
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


def _shard(model: nn.Module) -> nn.Module:
    mesh = torch.distributed.device_mesh.init_device_mesh(
        next(model.parameters()).device.type, (torch.distributed.get_world_size(),)
    )
    for blocks in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for block in blocks:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model
