"""How the ranks share a global batch: the same samples in every step, however many ranks there are."""

from __future__ import annotations

from dataclasses import dataclass

from harness.errors import ConfigError

__all__ = ["Shares"]

_SPARE = 1.12
"""So much longer than the best may a step be, in samples of a rank, for the sake of larger micro-batches:
many small passes cost more."""


@dataclass(frozen=True, slots=True)
class Shares:
    """A global batch in micro-batches of one size, dealt out in order and as evenly as it goes.

    Where they do not go round, some ranks have one less. They make up for it by a pass that counts for
    nothing, as sharded models need equally many on all ranks.
    """

    global_batch: int
    micro_batch: int
    world_size: int

    @classmethod
    def of(cls, global_batch: int, world_size: int, *, at_most: int | None = None) -> Shares:
        """In the largest micro-batches that keep all ranks about as busy as can be.

        Args:
            at_most: Samples that a micro-batch may have; a divisor of `global_batch`. None: a rank's share.

        Raises:
            ConfigError: there are more ranks than samples, or `at_most` does not divide them.
        """
        most = at_most or global_batch
        if global_batch < world_size or global_batch % most:
            raise ConfigError(
                f"a global batch of {global_batch} samples",
                rule=f"it has to hold one for each of {world_size} ranks, in whole micro-batches of {most}",
            )
        fitting = [
            cls(global_batch, size, world_size)
            for size in range(1, min(most, global_batch // world_size) + 1)
            if global_batch % size == 0
        ]
        least = min(shares.samples_per_rank for shares in fitting)
        good = [shares for shares in fitting if shares.samples_per_rank <= _SPARE * least]
        return max(good, key=lambda shares: shares.micro_batch)

    @property
    def samples_per_rank(self) -> int:
        """Of the busiest rank in a step."""
        return self.num_passes * self.micro_batch

    @property
    def num_passes(self) -> int:
        """Forward passes of each rank in a step."""
        return -(-self._num_micro_batches // self.world_size)

    @property
    def blank_frac(self) -> float:
        """Share of all passes that count for nothing."""
        return 1 - self._num_micro_batches / (self.num_passes * self.world_size)

    def offsets(self, rank: int) -> range:
        """Where the micro-batches of a rank begin in the global batch."""
        each, more = divmod(self._num_micro_batches, self.world_size)
        first = rank * each + min(rank, more)
        count = each + (rank < more)
        return range(first * self.micro_batch, (first + count) * self.micro_batch, self.micro_batch)

    @property
    def _num_micro_batches(self) -> int:
        return self.global_batch // self.micro_batch
