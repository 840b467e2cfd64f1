"""Makes of a step's numbers, once they are on the host, a record with names, units and a reason.

Legend: W ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from harness.records import Culprit, StepRecord
from harness.stability.before import UPDATE, WEIGHTS
from harness.stability.checks.all import Checks
from harness.stability.checks.base import Arrived, Reading
from harness.stability.checks.rows import ROWS, rows_of_rank
from harness.stability.layout import MAX_ABS, NUM_INF, NUM_NAN, NUM_ZERO, SUM_SQUARES, Layout
from harness.stability.packing import Packet
from harness.stability.rank_statistics import (
    CORRECT,
    FAULTS,
    LOSS_SUM,
    MICRO_BATCH,
    PARAMETER,
    REDUCED_BAD,
    TOKENS,
    Fault,
)
from harness.stability.rank_table import Floats, RankTable, count
from harness.stability.verdict import VERDICTS, Summary
from harness.stability.wording import describe_size

__all__ = ["RecordBuilder", "is_notable", "is_skip", "summary_of"]

SKIP = VERDICTS.index("skip")

_WORDS = {
    Fault.IGNORED_SKIP: "a fused optimizer of rank {rank} has changed parameters in an earlier step that was "
    "skipped: make it with fused=False, and go on from a checkpoint",
    Fault.IGNORED_CLIP: "a fused optimizer of rank {rank} has not divided gradients in an earlier step that "
    "was clipped: make it with fused=False",
    Fault.NO_GRADIENT: "rank {rank} has no gradient: step() came without backward(), or after zero_grad()",
    Fault.UNREDUCED: "rank {rank}'s gradients were not reduced: its backward pass went around the wrapper",
}

OUTSTANDING = 3.0
"""Times the median of the other ranks' norms from which a rank is blamed for a spike."""


@dataclass(frozen=True)
class _StepNumbers:
    """A step's numbers as plain values."""

    summary: Summary
    per_rank: Floats
    """`[W, NUM_FIELDS]`"""
    readings: list[Reading]
    """What the checks found that were measured in the step."""
    updates: list[list[float]]
    """By rank, how many parameters the update left not finite, and the row of the first; or nothing."""

    weights: list[list[float]]
    """The same of the weights that a step without a finite loss started from; or nothing."""

    @property
    def undone(self) -> bool:
        """Whether the update was taken back."""
        return any(num_bad for num_bad, _ in self.updates)

    @property
    def culprit(self) -> int | None:
        """The rank to blame: the one that went bad in the earliest micro-batch, the lowest of several."""
        return self.bad[0] if self.bad else None

    @property
    def is_of_weights(self) -> bool:
        """Whether weights that were broken before explain the step: they break every rank's loss, from its
        first micro-batch on. A mask's -inf breaks none."""
        is_everywhere = len(self.bad) == len(self.per_rank) and bool(
            (self.per_rank[:, MICRO_BATCH] <= 0).all()
        )
        return is_everywhere and any(num_bad for num_bad, _ in self.weights)

    @cached_property
    def bad(self) -> list[int]:
        """The ranks that went bad by themselves, by micro-batch and rank."""
        # By micro-batch first: what went bad earliest is the likeliest cause.
        wrong = self.per_rank[:, [NUM_NAN, NUM_INF, FAULTS]].any(1)
        ranks = np.flatnonzero(wrong | ~np.isfinite(self.per_rank[:, LOSS_SUM]))
        order = np.argsort(self.per_rank[ranks, MICRO_BATCH], kind="stable")
        bad: list[int] = ranks[order].tolist()
        return bad

    @property
    def culprits(self) -> tuple[Culprit, ...]:
        """All ranks to blame, the first first."""
        rank = self.outstanding
        blamed = self.bad or ([] if rank is None else [rank])
        return tuple(Culprit(rank=r, micro_batch=_micro_batch(self.row(r))) for r in blamed)

    @property
    def outstanding(self) -> int | None:
        """Of a spike or an outlier batch the rank whose own gradient stands out; None if it is not one rank's
        doing."""
        if not (self.summary.is_spike or self.summary.is_outlier):
            return None
        norms = np.sqrt(self.per_rank[:, SUM_SQUARES])
        rank = int(norms.argmax())
        others = np.delete(norms, rank)
        # Against the median of the others: where most norms are large it is no single rank's doing.
        stands_out = not others.size or norms[rank] > OUTSTANDING * np.median(others)
        return rank if stands_out else None

    def row(self, rank: int) -> list[float]:
        """What one rank said."""
        row: list[float] = self.per_rank[rank].tolist()
        return row

    def total(self, field: int) -> float:
        return float(self.per_rank[:, field].sum())


def summary_of(packet: Packet) -> Summary:
    """The decision on a step whose packet is in host memory."""
    return Summary(*packet["summary"].tolist())


def is_skip(summary: Summary) -> bool:
    """Whether a step left everything untouched."""
    return int(summary.verdict) >= SKIP


def is_notable(summary: Summary, packet: Packet) -> bool:
    """Whether the record of a step has a reason, or may have one: checks have measured something."""
    measured = packet.keys() - {"summary", "rank_statistics", UPDATE, WEIGHTS}
    return bool(is_skip(summary) or summary.is_spike or summary.norms_differ or measured)


class RecordBuilder:
    """Makes records of packets in host memory: `summary` [NUM_SUMMARY], `rank_statistics` [W, NUM_FIELDS],
    and now and then what the checks measured."""

    def __init__(self, layout: Layout, *, num_replicas: int, checks: Checks) -> None:
        self._layout = layout
        self._num_replicas = num_replicas
        self._checks = checks

    def build(self, step: int, packet: Packet, *, counts_tokens: bool) -> StepRecord:
        """The record of a step."""
        summary = summary_of(packet)
        arrived = Arrived(
            step=step, layout=self._layout, num_replicas=self._num_replicas, divisor=summary.divisor
        )
        readings = self._checks.read(packet, arrived)
        updates = packet[UPDATE].tolist() if UPDATE in packet else []
        weights = packet[WEIGHTS].tolist() if WEIGHTS in packet else []
        numbers = _StepNumbers(summary, packet["rank_statistics"].numpy().copy(), readings, updates, weights)
        rank, parameter, micro_batch = self._blamed(numbers)
        found = {name: value for reading in readings for name, value in reading.fields.items()}
        found["replicas_differ"] = bool(summary.norms_differ) or "replicas_differ" in found
        if rank is not None and ROWS in packet:
            found["culprit_parameters"] = rows_of_rank(packet[ROWS], rank, arrived)
        return StepRecord(
            step=step,
            verdict=VERDICTS[int(summary.verdict)],
            reason=self._reason(step, numbers),
            note=describe_size(step, summary) if summary.is_outlier else None,
            loss=summary.loss,
            grad_norm=summary.grad_norm,
            clip_coef=summary.clip_coef,
            num_tokens=int(numbers.total(TOKENS)) if counts_tokens else 0,
            num_correct=int(numbers.total(CORRECT)),
            num_nan=count(numbers.total(NUM_NAN)),
            num_inf=count(numbers.total(NUM_INF)),
            num_zero=count(numbers.total(NUM_ZERO)),
            max_abs=float(numbers.per_rank[:, MAX_ABS].max()) / summary.divisor,
            loss_scale=summary.loss_scale,
            rank=rank,
            parameter=parameter,
            micro_batch=micro_batch,
            culprits=numbers.culprits,
            per_rank=RankTable(numbers.per_rank, divisor=summary.divisor, counts_tokens=counts_tokens),
            measured={name: value for reading in readings for name, value in reading.values.items()},
            spike_score=max(summary.norm_score, summary.loss_score),
            is_spike=bool(summary.is_spike),
            is_outlier=bool(summary.is_outlier),
            is_absurd=bool(summary.is_absurd),
            undone=numbers.undone,
            findings=tuple(one for reading in readings for one in reading.findings),
            clipped_by_spike=bool(summary.clipped_by_spike),
            **found,
        )

    def _blamed(self, numbers: _StepNumbers) -> tuple[int | None, str | None, int | None]:
        """Rank, parameter and micro-batch of what is wrong with a step, as far as they are known."""
        if numbers.undone:
            return *self._first_bad(numbers.updates), None
        if numbers.is_of_weights:
            return *self._first_bad(numbers.weights), None
        rank = numbers.culprit if numbers.culprit is not None else numbers.outstanding
        if rank is not None:
            row = int(numbers.row(rank)[PARAMETER])
            name = self._layout.names[row] if row >= 0 else None
            return rank, name, _micro_batch(numbers.row(rank))
        # No rank's own gradient is bad and yet the sum is: the reduction overflowed, and no rank is to blame.
        if numbers.total(REDUCED_BAD):
            bad = numbers.row(int(np.flatnonzero(numbers.per_rank[:, REDUCED_BAD])[0]))
            return None, self._layout.names[int(bad[PARAMETER])], None
        accusing = next((reading for reading in numbers.readings if reading.reason), None)
        return (accusing.rank, accusing.parameter, None) if accusing else (None, None, None)

    def _first_bad(self, said: list[list[float]]) -> tuple[int, str]:
        """The first rank that has something that is not finite, and in which parameter."""
        rank = next(r for r, (num_bad, _) in enumerate(said) if num_bad)
        return rank, self._layout.names[int(said[rank][1])]

    def _broken_reason(self, numbers: _StepNumbers) -> str:
        rank, name = self._first_bad(numbers.weights)
        return f"{name} was not finite on rank {rank} before: an earlier update made it so"

    def _undone_reason(self, numbers: _StepNumbers) -> str:
        rank, name = self._first_bad(numbers.updates)
        num = int(max(num_bad for num_bad, _ in numbers.updates))
        more = f" and {num - 1} more" if num > 1 else ""
        what = f"the update left {name}{more} not finite, itself or its moments, on rank {rank}"
        return f"{what}, though the gradient was; it was taken back"

    def _reason(self, step: int, numbers: _StepNumbers) -> str | None:
        summary = numbers.summary
        reasons = [
            self._undone_reason(numbers) if numbers.undone else None,
            _skip_reason(numbers) if _has_reason_to_skip(numbers) else None,
            self._broken_reason(numbers) if numbers.is_of_weights else None,
            describe_size(step, summary) if summary.is_spike else None,
            *(reading.reason for reading in numbers.readings),
        ]
        # Where the checksums say which replica it is, their reason is enough.
        if summary.norms_differ and not any("replicas_differ" in found.fields for found in numbers.readings):
            reasons.append("reduced gradients differ between replicas")
        return "; ".join(reason for reason in reasons if reason) or None


def _has_reason_to_skip(numbers: _StepNumbers) -> bool:
    """Whether the step was left out for what it was before the update, and not for its size."""
    return numbers.summary.verdict >= SKIP and not numbers.summary.is_spike and not numbers.undone


def _micro_batch(one: list[float]) -> int | None:
    """The one to blame; None: the loop does not tell them apart."""
    return int(one[MICRO_BATCH]) if one[MICRO_BATCH] >= 0 else None


def _skip_reason(numbers: _StepNumbers) -> str:
    culprit = numbers.culprit
    if culprit is not None:
        return _blame(numbers.row(culprit), culprit)
    if not numbers.total(TOKENS):
        return "no tokens in the global batch"
    if numbers.total(REDUCED_BAD):
        return "the reduced gradient is not finite though every rank's own was: overflow in the reduction"
    return f"the gradient's norm of {numbers.summary.grad_norm:.3g} is beyond fp32"


def _blame(one: list[float], rank: int) -> str:
    faults = Fault(int(one[FAULTS]))
    for fault, words in _WORDS.items():
        if fault in faults:
            return words.format(rank=rank)
    if not math.isfinite(one[LOSS_SUM]):
        return f"the loss is {one[LOSS_SUM]} on rank {rank}"
    return f"{count(one[NUM_NAN])} NaN and {count(one[NUM_INF])} Inf in the gradient of rank {rank}"
