"""Makes of a step's numbers, once they are on the host, a record with names, units and a reason.

Legend: W ranks = R replicas x S shards, P parameters.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from torch import Tensor

from harness.records import Culprit, ParameterRow, RankRow, StepRecord
from harness.stability.layout import MAX_ABS, NUM_COLUMNS, NUM_INF, NUM_NAN, NUM_ZERO, SUM_SQUARES, Layout
from harness.stability.packing import Packet
from harness.stability.rank_statistics import (
    COMPUTE_S,
    CORRECT,
    DATA_WAIT_S,
    FAULTS,
    LOSS_SUM,
    MICRO_BATCH,
    PARAMETER,
    REDUCED_BAD,
    STOP_REQUESTED,
    TOKENS,
    Fault,
)
from harness.stability.replicas import DifferingReplica, find_differing
from harness.stability.samples import parameter_samples
from harness.stability.verdict import VERDICTS, Summary
from harness.stability.wording import describe_size

__all__ = ["RecordBuilder", "clip_coef", "is_notable", "is_skip"]

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


@dataclass(frozen=True, slots=True)
class _StepNumbers:
    """A step's numbers as plain values."""

    summary: Summary
    per_rank: list[list[float]]
    differing: DifferingReplica | None
    """What the checksums say, in the steps in which they were taken."""

    @property
    def culprit(self) -> int | None:
        """The rank to blame: the one that went bad in the earliest micro-batch, the lowest of several."""
        return next((rank for _, rank in self.bad), None)

    @property
    def bad(self) -> list[tuple[int, int]]:
        """Micro-batch and rank of whatever went bad by itself, in this order."""
        # By micro-batch first: what went bad earliest is the likeliest cause.
        return sorted((int(one[MICRO_BATCH]), r) for r, one in enumerate(self.per_rank) if _is_bad(one))

    @property
    def culprits(self) -> tuple[Culprit, ...]:
        """All ranks to blame, the first first."""
        rank = self.outstanding
        blamed = [r for _, r in self.bad] or ([] if rank is None else [rank])
        return tuple(Culprit(rank=r, micro_batch=_micro_batch(self.per_rank[r])) for r in blamed)

    @property
    def outstanding(self) -> int | None:
        """Of a spike or an outlier batch the rank whose own gradient stands out; None if it is not one rank's
        doing."""
        norms = [math.sqrt(one[SUM_SQUARES]) for one in self.per_rank]
        rank = norms.index(max(norms))
        others = norms[:rank] + norms[rank + 1 :]
        # Against the median of the others: where most norms are large it is no single rank's doing.
        stands_out = not others or norms[rank] > OUTSTANDING * statistics.median(others)
        unusual = self.summary.is_spike or self.summary.is_outlier
        return rank if unusual and stands_out else None

    def total(self, field: int) -> float:
        return sum(one[field] for one in self.per_rank)


def is_skip(packet: Packet) -> bool:
    """Whether a step, its packet in host memory, left everything untouched."""
    return int(packet["summary"][0]) >= SKIP


def is_notable(packet: Packet) -> bool:
    """Whether the record of a step has a reason, or may have one: checksums are yet to be compared. The
    step's packet is in host memory."""
    summary = Summary(*packet["summary"].tolist())
    return bool(is_skip(packet) or summary.is_spike or summary.norms_differ or "checksums" in packet)


def clip_coef(packet: Packet) -> float:
    """What the gradient was multiplied by."""
    return Summary(*packet["summary"].tolist()).clip_coef


class RecordBuilder:
    """Makes records of packets: `summary` [NUM_SUMMARY], `rank_statistics` [W, NUM_FIELDS], and now and then
    `rows` [W, P, 6], `checksums` [W, P], `samples` [1 or S, P, 5] and `attention` [W, L], all in
    host memory."""

    def __init__(self, layout: Layout, *, num_replicas: int) -> None:
        self._layout = layout
        self._num_replicas = num_replicas

    def build(self, step: int, packet: Packet, *, counts_tokens: bool) -> StepRecord:
        """The record of a step."""
        sums = packet.get("checksums")
        shape = (self._num_replicas, -1, len(self._layout))
        differing = None if sums is None else find_differing(sums.view(shape))
        summary = Summary(*packet["summary"].tolist())
        numbers = _StepNumbers(summary, packet["rank_statistics"].tolist(), differing)
        rank, parameter, micro_batch = self._blamed(numbers)
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
            num_nan=_count(numbers.total(NUM_NAN)),
            num_inf=_count(numbers.total(NUM_INF)),
            num_zero=_count(numbers.total(NUM_ZERO)),
            max_abs=max(one[MAX_ABS] for one in numbers.per_rank) / summary.divisor,
            loss_scale=summary.loss_scale,
            rank=rank,
            parameter=parameter,
            micro_batch=micro_batch,
            culprits=numbers.culprits,
            per_rank=tuple(
                _rank_row(rank, one, summary.divisor, counts_tokens)
                for rank, one in enumerate(numbers.per_rank)
            ),
            per_parameter=self._parameter_rows(packet.get("rows"), summary.divisor),
            sampled=parameter_samples(packet["samples"], self._layout) if "samples" in packet else {},
            attention_logit_max=_largest(packet.get("attention")),
            spike_score=max(summary.norm_score, summary.loss_score),
            is_spike=bool(summary.is_spike),
            is_outlier=bool(summary.is_outlier),
            is_absurd=bool(summary.is_absurd),
            clipped_by_spike=bool(summary.clipped_by_spike),
            replicas_differ=bool(summary.norms_differ) or differing is not None,
        )

    def _blamed(self, numbers: _StepNumbers) -> tuple[int | None, str | None, int | None]:
        """Rank, parameter and micro-batch of what is wrong with a step, as far as they are known."""
        rank = numbers.culprit if numbers.culprit is not None else numbers.outstanding
        if rank is not None:
            row = int(numbers.per_rank[rank][PARAMETER])
            name = self._layout.names[row] if row >= 0 else None
            return rank, name, _micro_batch(numbers.per_rank[rank])
        # No rank's own gradient is bad and yet the sum is: the reduction overflowed, and no rank is to blame.
        if numbers.total(REDUCED_BAD):
            bad = next(one for one in numbers.per_rank if one[REDUCED_BAD])
            return None, self._layout.names[int(bad[PARAMETER])], None
        if numbers.differing is not None:
            return numbers.differing.rank, self._layout.names[numbers.differing.row], None
        return None, None, None

    def _reason(self, step: int, numbers: _StepNumbers) -> str | None:
        summary = numbers.summary
        reasons = [
            _skip_reason(numbers) if summary.verdict >= SKIP and not summary.is_spike else None,
            describe_size(step, summary) if summary.is_spike else None,
            self._replica_reason(numbers),
        ]
        return "; ".join(reason for reason in reasons if reason) or None

    def _replica_reason(self, numbers: _StepNumbers) -> str | None:
        differing = numbers.differing
        if differing is not None:
            who = "replicas differ" if differing.rank is None else f"rank {differing.rank} differs"
            return f"{who} in {self._layout.names[differing.row]} or its optimizer state"
        return "reduced gradients differ between replicas" if numbers.summary.norms_differ else None

    def _parameter_rows(self, rows: Tensor | None, divisor: float) -> dict[str, ParameterRow]:
        """Rows of all ranks, `[W, P, 6]`, as one per parameter."""
        if rows is None:
            return {}
        # Replicas hold the same reduced gradient; the shards of the first make up the whole.
        shards = rows.view(self._num_replicas, -1, *rows.shape[1:])[0]
        # Behind the NUM_COLUMNS of a rank's own gradient stands the reduced gradient's sum of squares.
        norms = (shards[:, :, NUM_COLUMNS].sum(0).sqrt() / divisor).tolist()
        totals = rows.sum(0).tolist()
        largest = (rows[:, :, MAX_ABS].amax(0) / divisor).tolist()
        return {
            name: ParameterRow(
                grad_norm=norms[row],
                max_abs=largest[row],
                num_nan=_count(totals[row][NUM_NAN]),
                num_inf=_count(totals[row][NUM_INF]),
                num_zero=_count(totals[row][NUM_ZERO]),
                num_elements=self._layout.sizes[row],
            )
            for row, name in enumerate(self._layout.names)
        }


def _rank_row(rank: int, one: list[float], divisor: float, counts_tokens: bool) -> RankRow:
    tokens = one[TOKENS]
    return RankRow(
        rank=rank,
        loss=one[LOSS_SUM] / tokens if tokens else math.nan,
        num_tokens=int(tokens) if counts_tokens else 0,
        grad_norm=math.sqrt(one[SUM_SQUARES]) / divisor,
        max_abs=one[MAX_ABS] / divisor,
        num_nan=_count(one[NUM_NAN]),
        num_inf=_count(one[NUM_INF]),
        num_zero=_count(one[NUM_ZERO]),
        compute_s=one[COMPUTE_S],
        data_wait_s=one[DATA_WAIT_S],
        stop_requested=bool(one[STOP_REQUESTED]),
    )


def _micro_batch(one: list[float]) -> int | None:
    """The one to blame; None: the loop does not tell them apart."""
    return int(one[MICRO_BATCH]) if one[MICRO_BATCH] >= 0 else None


def _is_bad(one: list[float]) -> bool:
    gradient = one[NUM_NAN] or one[NUM_INF] or one[FAULTS]
    return bool(gradient) or not math.isfinite(one[LOSS_SUM])


def _skip_reason(numbers: _StepNumbers) -> str:
    culprit = numbers.culprit
    if culprit is not None:
        return _blame(numbers.per_rank[culprit], culprit)
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
    return f"{_count(one[NUM_NAN])} NaN and {_count(one[NUM_INF])} Inf in the gradient of rank {rank}"


def _largest(logits: Tensor | None) -> tuple[float, ...]:
    """Over ranks, of `[W, L]`."""
    return () if logits is None else tuple(logits.amax(0).tolist())


def _count(value: float) -> int:
    """A count as an integer; -1: not measured."""
    return -1 if math.isnan(value) else int(value)
