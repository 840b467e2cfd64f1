"""Messages for people: rank 0 speaks at INFO, every other rank at WARNING and above, so that a culprit
can always be heard."""

from __future__ import annotations

import logging
import sys

__all__ = ["setup"]


def setup(*, rank: int = 0, world_size: int = 1, level: int = logging.INFO) -> None:
    """Installs one handler on the `harness` logger; the root logger is left alone. Idempotent."""
    logger = logging.getLogger("harness")
    logger.setLevel(level if rank == 0 else max(level, logging.WARNING))
    logger.propagate = False
    prefix = f"[rank {rank}] " if world_size > 1 else ""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(levelname).1s %(message)s", "%H:%M:%S"))
    for old in list(logger.handlers):
        logger.removeHandler(old)
    logger.addHandler(handler)
