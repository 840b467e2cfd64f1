"""What the fingerprints of the ranks' batches say: constant, shared, repeated, overlapping. On the host.

Legend: W ranks, K steps of a look, n samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["NUM_SAMPLES", "BatchHistory", "RankBatches", "SampleOwners", "constant_ranks", "sharing_ranks"]

MIN_SAME = 5
"""Batches that have to be the same one after another, or on two ranks."""

MIN_EPOCH = 32
"""Batches of an epoch whose order is looked at. Fewer are repeated on purpose: updates of a policy on what
was rolled out, a few batches that are to be overfitted."""

NUM_SAMPLES = 8
"""Fingerprints of samples of a batch that travel. Which samples is decided by the fingerprints themselves:
one that is chosen once is chosen again, in whatever batch."""

MAX_RANKS = 16
"""Whose batches and samples are remembered."""

MAX_REMEMBERED = 1 << 16
"""Batches, and samples, of a rank; what is older is forgotten with all the rest."""

MIN_ELSEWHERE = 16
"""Samples per rank that were another rank's before, while none came to its own rank again. Where all ranks
draw from all samples, one of W comes back to its own: e^-16 for 16 W that do not."""

MIN_DISTINCT_FRAC = 0.9
"""Of a rank's samples; with fewer, equal ones are no sign of anything."""


@dataclass(frozen=True, slots=True)
class RankBatches:
    """What one rank has trained on since the last look."""

    whole: Sequence[int]
    """`[K]`, a fingerprint of each batch; 0 where there was none to see."""
    samples: Sequence[Sequence[int]]
    """`[K, NUM_SAMPLES]`, of some samples of each; 0 where there was none."""

    @property
    def seen(self) -> list[int]:
        """The batches that there were to see."""
        return [one for one in self.whole if one]

    @property
    def are_distinct(self) -> bool:
        """Whether its own samples differ, as a rule."""
        drawn = [one for step in self.samples for one in step if one]
        return bool(drawn) and len(set(drawn)) >= MIN_DISTINCT_FRAC * len(drawn)


def constant_ranks(ranks: Sequence[RankBatches]) -> list[int]:
    """Those whose batches were one and the same."""
    return [rank for rank, one in enumerate(ranks) if len(one.seen) >= MIN_SAME and len(set(one.seen)) == 1]


def sharing_ranks(ranks: Sequence[RankBatches]) -> list[int]:
    """Those that have trained on what another one trained on in the same steps: whole batches, or at least
    half of the samples of each."""
    batches = [one.seen for one in ranks]
    num_with = Counter(map(tuple, batches))
    shared = {rank for rank, one in enumerate(batches) if len(one) >= MIN_SAME and num_with[tuple(one)] > 1}
    num_steps = [0] * len(ranks)
    for step in range(min(len(one.samples) for one in ranks)):
        drawn = [{sample for sample in one.samples[step] if sample} for one in ranks]
        owners: dict[int, int] = {}
        for samples in drawn:
            for sample in samples:
                owners[sample] = owners.get(sample, 0) + 1
        for rank, samples in enumerate(drawn):
            num_shared = sum(owners[sample] > 1 for sample in samples)
            num_steps[rank] += bool(samples) and 2 * num_shared >= len(samples)
    shared |= {rank for rank, num in enumerate(num_steps) if num >= MIN_SAME and ranks[rank].are_distinct}
    return sorted(shared)


@dataclass(slots=True)
class _History:
    """One rank's."""

    num: int = 0
    """Batches so far."""
    last: dict[int, int] = field(default_factory=dict)
    """The place at which a batch was seen last."""
    period: int = 0
    """Batches after which the first one came again; 0: it has not."""
    num_in_order: int = 0
    """Batches that came again after `period` others."""
    is_other: bool = False
    """Whether batches come in any other way: then there is no more to see."""

    def take(self, batch: int) -> None:
        distance = self.num - self.last.get(batch, self.num)
        self.period = self.period or distance
        self.is_other = distance != self.period
        self.num_in_order += self.period > 0
        if self.is_other or len(self.last) >= MAX_REMEMBERED:
            self.last.clear()
        self.last[batch] = self.num
        self.num += 1


@dataclass(slots=True)
class BatchHistory:
    """Remembers the batches of earlier looks, a number each, of the first `MAX_RANKS` ranks."""

    _of_rank: list[_History] = field(default_factory=list)

    def periods(self, ranks: Sequence[RankBatches]) -> dict[int, int]:
        """Takes in what the ranks have trained on; by rank, for those whose batches have come in one and the
        same order again and again since the first, for a whole epoch at least: its number of batches. What
        is repeated for a while and then never again is no epoch."""
        ranks = ranks[:MAX_RANKS]
        if len(self._of_rank) != len(ranks):
            self._of_rank = [_History() for _ in ranks]
        for history, rank in zip(self._of_rank, ranks, strict=True):
            for batch in rank.seen:
                if not history.is_other:
                    history.take(batch)
        return {
            rank: history.period
            for rank, history in enumerate(self._of_rank)
            if history.num_in_order >= history.period >= MIN_EPOCH and not history.is_other
        }


@dataclass(slots=True)
class SampleOwners:
    """Remembers which ranks have had which samples. Ranks that go through the whole data set by themselves
    meet the samples of others from the start on, now and then, while all of their own are new. A new epoch is
    another thing: all samples come again, and some to the same rank."""

    _ranks: dict[int, int] = field(default_factory=dict)
    """By sample, the ranks that have had it, a bit each."""
    _num_elsewhere: int = 0
    """Samples that another rank had had before."""
    _num_again: int = 0
    """Samples that came to the same rank again."""
    _num_new: int = 0
    """Samples that nobody had had, since the first that somebody had."""

    def num_elsewhere(self, ranks: Sequence[RankBatches]) -> int:
        """Takes in the samples of the ranks; how many were another rank's before, if slices overlap; else
        0."""
        ranks = ranks[:MAX_RANKS]
        if len(self._ranks) > MAX_REMEMBERED:
            self._ranks, self._num_elsewhere, self._num_again, self._num_new = {}, 0, 0, 0
        for rank, one in enumerate(ranks):
            for step in one.samples:
                for sample in set(step) - {0}:
                    self._take(sample, 1 << rank)
        is_overlap = self._num_elsewhere >= MIN_ELSEWHERE * len(ranks) and not self._num_again
        return self._num_elsewhere if is_overlap and self._num_new >= self._num_elsewhere else 0

    def _take(self, sample: int, bit: int) -> None:
        before = self._ranks.get(sample, 0)
        self._num_again += bool(before & bit)
        self._num_elsewhere += bool(before) and not before & bit
        self._num_new += not before and self._num_elsewhere > 0
        self._ranks[sample] = before | bit
