"""How a model is spread over the processes: plain, DDP or FSDP2; what is computed again; what is compiled.

The order matters. Activation checkpointing goes around a block, so that what is computed again is in the block's
compiled code; FSDP2 goes around both, so that parameters are gathered outside of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from harness.config import LoopConfig, ParallelConfig
from harness.dist.activations import checkpoint_activations
from harness.dist.deferred import Deferred
from harness.dist.mesh import open_mesh
from harness.dist.world import World
from harness.errors import ConfigError

__all__ = ["compile_model", "distribute", "gradient_sync", "hands_out_buffers", "plain"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def distribute(
    model: nn.Module,
    parallel: ParallelConfig,
    world: World,
    *,
    loop: LoopConfig | None = None,
    deferred: Deferred | None = None,
) -> nn.Module:
    """Compiles `model` as `loop` says, moves it to the world's device and wraps it as configured, in place.

    The unit of activation checkpointing, of compilation by blocks and of FSDP2 is a block: an element of the model's
    outermost `ModuleList`s, which is where repeated layers stand. FSDP2 then shards the rest as a whole. It moves
    block by block: no device holds the whole model.

    Args:
        deferred: Within which it was built; what was put off is made up for.

    Raises:
        ConfigError: there are no blocks, and they are needed; the mesh does not fit the world.
    """
    if deferred is not None:
        deferred.name(model)
    blocks = _blocks(model)
    if parallel.activation_checkpointing != "none":
        _require_blocks(blocks, f"parallel.activation_checkpointing is {parallel.activation_checkpointing!r}")
        blocks = checkpoint_activations(model, blocks, parallel.activation_checkpointing)
    if loop is not None:
        compile_model(model, loop, blocks=blocks)
    if parallel.strategy == "fsdp":
        _shard(model, blocks, parallel, world)
        if deferred is not None:
            deferred.materialise(model, world.device)
        _move(model, world.device)
        return model
    _move(model, world.device)
    if world.world_size == 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[world.device] if world.device.type == "cuda" else None,
        bucket_cap_mb=parallel.bucket_cap_mb,
        find_unused_parameters=parallel.find_unused,
        gradient_as_bucket_view=True,
    )


def compile_model(model: nn.Module, loop: LoopConfig, *, blocks: list[nn.Module] | None = None) -> None:
    """Has `model`, or each of its blocks, compiled when it is called first; nothing without `loop.compile`.

    Raises:
        ConfigError: there are no blocks.
    """
    if not loop.compile:
        return
    units = [model]
    if loop.compile_unit == "block":
        units = _blocks(model) if blocks is None else blocks
        _require_blocks(units, "loop.compile_unit is 'block'")
    for unit in units:
        unit.compile(backend=loop.compile_backend)


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


def hands_out_buffers(model: nn.Module) -> bool:
    """Whether a step's first forward pass gives every rank the buffers of rank 0."""
    return isinstance(model, DistributedDataParallel) and bool(model.will_sync_module_buffers())


def _move(model: nn.Module, device: torch.device) -> None:
    """Tensors without data, which memory is forecast with, cannot be moved: what is there already is left alone."""
    if any(tensor.device != device for tensor in itertools.chain(model.parameters(), model.buffers())):
        model.to(device)


def _shard(model: nn.Module, blocks: list[nn.Module], parallel: ParallelConfig, world: World) -> None:
    """From the inside out: each block, then what is left."""
    mesh = open_mesh(parallel, world)
    policy = MixedPrecisionPolicy(
        # None: each parameter's own, which is bf16 where the model is. Gradients would be reduced in that too.
        param_dtype=torch.bfloat16 if parallel.param_dtype == "bf16" else None,
        reduce_dtype=_DTYPES[parallel.reduce_dtype],
        cast_forward_inputs=False,  # autocast does that, operation by operation
    )
    for unit in (*blocks, model):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    if isinstance(model, FSDPModule) and hasattr(model, "set_reduce_scatter_unused_params"):  # torch 2.13
        # Else ranks that used different experts of a mixture would reduce buffers of different sizes.
        model.set_reduce_scatter_unused_params(True)


def _require_blocks(blocks: list[nn.Module], setting: str) -> None:
    if not blocks:
        raise ConfigError(
            f"{setting}, and the model has no blocks",
            rule="its repeated layers stand in a torch.nn.ModuleList",
            remedy="put them into one, or leave the setting away",
        )


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
