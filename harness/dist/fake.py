"""A world of ranks that do not exist: to see what one of many would hold, without any of the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from harness.dist.world import World
from harness.errors import LaunchError

__all__ = ["fake_world"]


@contextmanager
def fake_world(world_size: int) -> Iterator[World]:
    """Rank 0 of a process group whose collectives return at once, with nothing in them; on the CPU.

    Raises:
        LaunchError: this process is already in a group.
    """
    if dist.is_initialized():
        raise LaunchError(
            "this process is one of several already",
            rule="a world of fake ranks is a process by itself",
            remedy="start it without a launcher",
        )
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield World(rank=0, local_rank=0, world_size=world_size, device=torch.device("cpu"))
    finally:
        dist.destroy_process_group()
