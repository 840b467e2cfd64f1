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
"""Under which an attempt notes its own in the log."""


def keep_micro_batch(config: TrainConfig, world: World, directory: Path) -> TrainConfig:
    """The configuration with no larger micro-batches than the attempt before had: what was dealt out to more
    ranks may not fit into the memory of fewer. On all ranks together."""
    loop = config.loop
    if loop.micro_batch is not None:
        return config
    before = from_main(lambda: newest_attempt(directory).get(NOTED))
    if not isinstance(before, int) or before >= loop.global_batch // world.world_size:
        return config
    return dataclasses.replace(config, loop=dataclasses.replace(loop, micro_batch=before))


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
