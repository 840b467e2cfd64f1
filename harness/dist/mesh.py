"""The ranks of a sharded run on two named axes: copies of the model, and the shards of each copy.

Ranks that hold the shards of one copy stand next to one another, so on one machine where it has enough: what is
gathered and scattered in every layer goes over its fast links, and between machines one all-reduce per unit.
"""

from __future__ import annotations

import datetime
import logging
from typing import cast

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from harness import env
from harness.config import ParallelConfig
from harness.dist.world import World

__all__ = ["REPLICATE", "SHARD", "open_mesh"]

REPLICATE, SHARD = "replicate", "shard"

logger = logging.getLogger(__name__)


def open_mesh(parallel: ParallelConfig, world: World) -> DeviceMesh:
    """The mesh of all ranks for `fully_shard`: of the axis `shard`, or of `replicate` and `shard` (HSDP).

    All ranks call it together: groups are made.

    Raises:
        ConfigError: the configured mesh does not fit the world, and no launcher has changed that.
    """
    replicate, shard = parallel.mesh_shape(world.world_size, may_refit=env.is_restartable())
    if _is_refitted(parallel, replicate, shard) and world.is_main:
        logger.warning(
            "parallel.replicate %d and parallel.shard %d do not make up %d ranks: %d x %d is taken",
            parallel.replicate,
            parallel.shard,
            world.world_size,
            replicate,
            shard,
        )
    kind = world.device.type
    if replicate == 1:
        return init_device_mesh(kind, (shard,), mesh_dim_names=(SHARD,))
    rows = [list(range(first, first + shard)) for first in range(0, world.world_size, shard)]
    columns = [list(column) for column in zip(*rows, strict=True)]
    names = (REPLICATE, SHARD)
    groups = [
        _own_group(groups, name, parallel.timeout_s)
        for name, groups in zip(names, (columns, rows), strict=True)
    ]
    return DeviceMesh.from_group(groups, kind, mesh=rows, mesh_dim_names=names)


def _own_group(groups: list[list[int]], name: str, timeout_s: float) -> dist.ProcessGroup:
    """That of this rank. `init_device_mesh` would make them with torch's default timeout."""
    own, _ = dist.new_subgroups_by_enumeration(
        groups, timeout=datetime.timedelta(seconds=timeout_s), group_desc=f"mesh_{name}"
    )
    return cast(dist.ProcessGroup, own)


def _is_refitted(parallel: ParallelConfig, replicate: int, shard: int) -> bool:
    pairs = ((parallel.replicate, replicate), (parallel.shard, shard))
    return any(configured not in (0, -1, taken) for configured, taken in pairs)
