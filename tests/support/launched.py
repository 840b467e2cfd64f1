"""What a launcher leaves in the environment, for libraries that look there."""

from __future__ import annotations

import os
import sys

import torch.distributed as dist

__all__ = ["as_launched", "each_alone", "forget_accelerators"]


def as_launched(world_size: int) -> None:
    """Sets what torchrun would set on one machine. The group is there already, so nobody connects."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", LOCAL_WORLD_SIZE=str(world_size))


def each_alone() -> None:
    """Splits the ranks: each goes on as the only one of a group of its own, with what it has imported."""
    dist.barrier()
    dist.destroy_process_group()
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    as_launched(1)
    if "accelerate" in sys.modules:
        forget_accelerators()


def forget_accelerators() -> None:
    """The next Accelerator is made as the first of a process, with what it is told."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()
