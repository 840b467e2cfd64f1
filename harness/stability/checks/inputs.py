"""Whether ranks get samples and random numbers of their own, and each step another batch.

Legend: W ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from harness.config import GuardConfig
from harness.records import Finding
from harness.stability.audits.evaluation import generators_hash
from harness.stability.audits.forward import ForwardWatch, is_dropout
from harness.stability.checks.base import Arrived, Check, Reading, StepView
from harness.stability.checks.batches import (
    MAX_RANKS,
    NUM_SAMPLES,
    BatchHistory,
    RankBatches,
    SampleOwners,
    constant_ranks,
    sharing_ranks,
)
from harness.stability.checks.cadence import LOOK_EVERY, is_look
from harness.stability.host_copy import is_capturing
from harness.stability.optimizers import Optimizers
from harness.stability.rank_words import on_ranks

__all__ = ["InputsCheck"]

SAMPLES_PER_STEP = NUM_SAMPLES // 2
"""On average, so that seldom more are chosen than travel."""


class InputsCheck(Check):
    """Fingerprints of the batches since the last look and of some of their samples, and of the state of the
    random generators. A few small kernels a step, on about 4,096 elements of each input."""

    name = "inputs"
    every_step = True

    def __init__(self, config: GuardConfig, forward: ForwardWatch) -> None:
        self.every = 1 if config.silent_errors == "on" else 0
        self.every_step = self.every > 0
        self._forward = forward
        self._recent: list[Tensor] = []
        self._one_of: int | None = None
        """Of so many samples one is chosen, by its fingerprint; a power of two."""
        self._history, self._owners, self._last_read = BatchHistory(), SampleOwners(), -1

    def attach(self, model: nn.Module, optimizers: Optimizers) -> None:
        if not self.every:
            return
        self._has_dropout = any(map(is_dropout, model.modules()))
        self._device = next(model.parameters()).device
        self._generators = generators_hash(self._device)

    def is_due(self, step: int) -> bool:
        return self.every > 0 and step > 0 and is_look(step)

    def observe(self, view: StepView) -> None:
        self._recent.append(self._of_step(view.rows.device))
        del self._recent[:-LOOK_EVERY]

    def measure(self, view: StepView) -> Tensor:
        """`[2 + LOOK_EVERY x (1 + NUM_SAMPLES)]` int64: whether dropout drew something, the state of the
        generators, and the fingerprints of the last batches, 0 where there was none to see."""
        generators = self._generators if is_capturing() else generators_hash(self._device)
        draws = self._has_dropout and generators != self._generators
        self._generators = generators
        host = torch.tensor([int(draws), generators], pin_memory=view.rows.is_cuda)
        missing = [torch.zeros_like(self._recent[0])] * (LOOK_EVERY - len(self._recent))
        recent = torch.cat(self._recent + missing)
        self._recent = []
        return torch.cat([host.to(recent.device, non_blocking=True), recent])

    def read(self, numbers: Tensor, arrived: Arrived) -> Reading:
        """Of `[W, 2 + LOOK_EVERY x (1 + NUM_SAMPLES)]`."""
        generators = [tuple(row) for row in numbers[:, :2].tolist()]
        steps = numbers[:, 2:].view(len(numbers), LOOK_EVERY, 1 + NUM_SAMPLES).tolist()
        ranks = [RankBatches([step[0] for step in rank], [step[1:] for step in rank]) for rank in steps]
        is_new, self._last_read = arrived.step > self._last_read, max(arrived.step, self._last_read)
        # A record may be made twice, and no batch was drawn twice for that.
        return Reading(findings=[*_of_generators(generators), *(self._of_batches(ranks) if is_new else ())])

    def forget(self) -> None:
        self._recent = []
        self._forget_batches()

    def _forget_batches(self) -> None:
        self._history, self._owners, self._last_read = BatchHistory(), SampleOwners(), -1

    def _of_step(self, device: torch.device) -> Tensor:
        """`[1 + NUM_SAMPLES]` int64 of the step at hand; zeros where there was nothing to see."""
        batches = [batch for batch in self._forward.batches if len(batch.samples)]
        whole = [batch.whole.to(device, non_blocking=True) for batch in self._forward.batches]
        total = torch.stack(whole).sum()[None] if whole else torch.zeros(1, dtype=torch.int64, device=device)
        if not batches:
            return nn.functional.pad(total, (0, NUM_SAMPLES))
        samples = torch.cat([batch.samples for batch in batches]).to(device, non_blocking=True)
        if self._one_of is None:
            self._one_of = 1 << (len(samples) // SAMPLES_PER_STEP).bit_length() >> 1 or 1
        is_chosen = (samples >> 40) & (self._one_of - 1) == 0
        last = torch.iinfo(torch.int64).max
        chosen = (
            torch.where(is_chosen, samples, last).topk(min(NUM_SAMPLES, len(samples)), largest=False).values
        )
        chosen = torch.where(chosen == last, 0, chosen)
        return torch.cat([total, nn.functional.pad(chosen, (0, NUM_SAMPLES - len(chosen)))])

    def _of_batches(self, ranks: list[RankBatches]) -> Iterator[Finding]:
        num = len(ranks)
        constant, shared = constant_ranks(ranks), sharing_ranks(ranks)
        if constant:
            yield _finding(
                "constant batch",
                f"the last {len(ranks[constant[0]].seen)} batches were the same one"
                + on_ranks(constant, num)
                + ": is the batch the whole data set?",
                "nothing is wrong if it is; else look at the loader: is its iterator made anew in every "
                "step, or its index ignored",
                constant[0] if len(constant) == 1 else None,
            )
        if shared:
            yield _finding(
                "shared batch",
                f"the samples of the last {len(ranks[shared[0]].seen)} batches were the same"
                + _of(shared, num),
                "give each rank its slice of the data: a DistributedSampler, with set_epoch",
            )
        yield from self._of_history(ranks, has_shared=bool(shared))

    def _of_history(self, ranks: list[RankBatches], *, has_shared: bool) -> Iterator[Finding]:
        periods = self._history.periods(ranks)
        if periods:
            yield _repeated(sorted(periods), min(periods.values()), min(len(ranks), MAX_RANKS))
        num = self._owners.num_elsewhere(ranks)
        if num and not has_shared:
            yield _finding(
                "overlapping slices",
                f"{num} samples came to one rank and then to another, and none to the same rank again: each "
                "goes through all of the data by itself",
                "give each rank its slice of the data: a DistributedSampler with one seed for all ranks",
            )


def _repeated(ranks: list[int], period: int, num_ranks: int) -> Finding:
    problem = f"all batches come again in the order of {period} steps before"
    question = ": is each epoch to have the same order?"
    remedy = (
        "nothing is wrong if they are repeated on purpose; else shuffle, and call the DistributedSampler's "
        "set_epoch(epoch) before each epoch"
    )
    rank = ranks[0] if len(ranks) == 1 else None
    return _finding("repeated batch", problem + on_ranks(ranks, num_ranks) + question, remedy, rank)


def _of_generators(states: list[tuple[int, ...]]) -> Iterator[Finding]:
    num_in = Counter(states)
    same = [rank for rank, one in enumerate(states) if one[0] and num_in[one] > 1]
    if same:
        yield _finding(
            "generators",
            f"the random generators are in the same state{_of(same, len(states))}, which drop the same units",
            "seed each rank by its own number once the model is made",
        )


def _finding(check: str, problem: str, remedy: str, rank: int | None = None) -> Finding:
    return Finding(check=check, problem=problem, remedy=remedy, rank=rank)


def _of(ranks: list[int], num_ranks: int) -> str:
    return on_ranks(ranks, num_ranks) or " on all ranks"
