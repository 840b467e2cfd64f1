"""What a launcher leaves in the environment, for libraries that look there."""

from __future__ import annotations

import os

__all__ = ["as_launched"]


def as_launched(world_size: int) -> None:
    """Sets what torchrun would set on one machine. The group is there already, so nobody connects."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", LOCAL_WORLD_SIZE=str(world_size))
