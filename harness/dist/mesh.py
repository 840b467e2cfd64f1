"""The ranks of a sharded run on two named axes: copies of the model, and the shards of each copy.

Ranks that hold the shards of one copy stand next to one another, so on one machine where it has enough: what is
gathered and scattered in every layer goes over its fast links, and between machines one all-reduce per unit.
"""

from __future__ import annotations

import logging

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
    return init_device_mesh(kind, (replicate, shard), mesh_dim_names=(REPLICATE, SHARD))


def _is_refitted(parallel: ParallelConfig, replicate: int, shard: int) -> bool:
    pairs = ((parallel.replicate, replicate), (parallel.shard, shard))
    return any(configured not in (0, -1, taken) for configured, taken in pairs)
