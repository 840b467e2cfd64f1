"""The size of micro-batches where nobody has set it, when a run goes on with fewer ranks than before."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from harness.config import TrainConfig
from harness.data import Shares
from harness.dist import World, from_main
from harness.runlog.attempts import newest_attempt

__all__ = ["NOTED", "keep_micro_batch", "say_shares"]

logger = logging.getLogger(__name__)

NOTED = "micro_batch"
"""Under which an attempt notes in the log what has fitted: its own size, or a larger one before."""


def keep_micro_batch(config: TrainConfig, world: World, directory: Path) -> tuple[TrainConfig, int]:
    """The configuration with no larger micro-batches than have fitted in the attempts before, and that size:
    what was dealt out to more ranks may not fit into the memory of fewer. 0: nothing is known of it, or the
    configuration sets the size. On all ranks together."""
    loop = config.loop
    if loop.micro_batch is not None:
        return config, 0
    before = from_main(lambda: newest_attempt(directory).get(NOTED))
    if not isinstance(before, int) or before < 1:
        return config, 0
    if before >= loop.global_batch // world.world_size:
        return config, before
    size = max(size for size in range(1, before + 1) if loop.global_batch % size == 0)
    return dataclasses.replace(config, loop=dataclasses.replace(loop, micro_batch=size)), before


def say_shares(shares: Shares) -> None:
    """A line where the ranks are not equally busy."""
    if shares.blank_frac:
        logger.warning(
            "a global batch of %d does not go round on %d ranks: each makes %d passes of %d samples a step,"
            " of which %.0f %% count for nothing",
            shares.global_batch,
            shares.world_size,
            shares.num_passes,
            shares.micro_batch,
            100 * shares.blank_frac,
        )
