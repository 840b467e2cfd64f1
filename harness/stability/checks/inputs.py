"""Whether ranks get data and random numbers of their own, and each step another batch.

Legend: W ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from harness.config import GuardConfig
from harness.records import Finding
from harness.stability.audits.evaluation import generators_hash
from harness.stability.audits.forward import ForwardWatch, is_dropout
from harness.stability.checks.base import Arrived, Check, Reading, StepView
from harness.stability.checks.cadence import LOOK_EVERY, is_look
from harness.stability.host_copy import is_capturing
from harness.stability.optimizers import Optimizers
from harness.stability.rank_words import on_ranks

__all__ = ["InputsCheck"]

MIN_SAME = 5
"""Batches that have to be the same one after another, or on two ranks."""


class InputsCheck(Check):
    """Fingerprints of the batches since the last look, and of the state of the random generators. A few small
    kernels a step, on at most 4,096 elements of each input."""

    name = "inputs"
    every_step = True

    def __init__(self, config: GuardConfig) -> None:
        self.every = 1 if config.silent_errors == "on" else 0
        self.every_step = self.every > 0
        self._recent: list[Tensor] = []

    def attach(self, model: nn.Module, optimizers: Optimizers) -> None:
        if not self.every:
            return
        self._forward = ForwardWatch(model, fingerprints=True)
        self._has_dropout = any(map(is_dropout, model.modules()))
        self._device = next(model.parameters()).device
        self._generators = generators_hash(self._device)

    def is_due(self, step: int) -> bool:
        return self.every > 0 and step > 0 and is_look(step)

    def observe(self, view: StepView) -> None:
        device = view.rows.device
        prints = [one.to(device, non_blocking=True) for one in self._forward.fingerprints]
        self._forward.clear()
        nothing = torch.zeros((), dtype=torch.int64, device=device)
        self._recent.append(torch.stack(prints).sum() if prints else nothing)
        del self._recent[:-LOOK_EVERY]

    def measure(self, view: StepView) -> Tensor:
        """`[2 + LOOK_EVERY]` int64: whether dropout drew something, the state of the generators, and the
        fingerprints of the last batches, 0 where there was none to see."""
        generators = self._generators if is_capturing() else generators_hash(self._device)
        draws = self._has_dropout and generators != self._generators
        self._generators = generators
        host = torch.tensor([int(draws), generators], pin_memory=view.rows.is_cuda)
        missing = [torch.zeros_like(self._recent[0])] * (LOOK_EVERY - len(self._recent))
        recent = torch.stack(self._recent + missing)
        return torch.cat([host.to(recent.device, non_blocking=True), recent])

    def read(self, numbers: Tensor, arrived: Arrived) -> Reading:
        """Of `[W, 2 + LOOK_EVERY]`."""
        rows = numbers.tolist()
        findings = []
        generators = [tuple(row[:2]) for row in rows]
        same = [rank for rank, one in enumerate(generators) if one[0] and generators.count(one) > 1]
        if same:
            findings.append(
                _finding(
                    "generators",
                    f"the random generators are in the same state{_of(same, len(rows))}, which drop the same "
                    "units",
                    "seed each rank by its own number once the model is made",
                )
            )
        batches = [[one for one in row[2:] if one] for row in rows]
        constant = [rank for rank, one in enumerate(batches) if len(one) >= MIN_SAME and len(set(one)) == 1]
        if constant:
            findings.append(
                _finding(
                    "constant batch",
                    f"the last {len(batches[constant[0]])} batches were the same one"
                    + on_ranks(constant, len(rows))
                    + ": is the batch the whole data set?",
                    "nothing is wrong if it is; else look at the loader: is its iterator made anew in every "
                    "step, or its index ignored",
                    constant[0] if len(constant) == 1 else None,
                )
            )
        shared = [rank for rank, one in enumerate(batches) if len(one) >= MIN_SAME and batches.count(one) > 1]
        if shared:
            findings.append(
                _finding(
                    "shared batch",
                    f"the last {len(batches[shared[0]])} batches were the same{_of(shared, len(rows))}",
                    "give each rank its slice of the data: a DistributedSampler, with set_epoch",
                )
            )
        return Reading(findings=findings)

    def forget(self) -> None:
        self._recent = []
        if self.every:
            self._forward.clear()

    def close(self) -> None:
        if self.every:
            self._forward.close()


def _finding(check: str, problem: str, remedy: str, rank: int | None = None) -> Finding:
    return Finding(check=check, problem=problem, remedy=remedy, rank=rank)


def _of(ranks: list[int], num_ranks: int) -> str:
    return on_ranks(ranks, num_ranks) or " on all ranks"
