"""From packed numbers on the device to step records on the host, a fixed number of steps later.

This is the one place where the guard's numbers are read back.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from harness.dist.collectives import gather_lanes
from harness.records import ParameterRow, RankRow, StepRecord
from harness.stability import lane
from harness.stability.layout import MAX_ABS, NUM_COLUMNS, NUM_INF, NUM_NAN, NUM_ZERO, SUM_SQUARES, Layout
from harness.stability.verdict import NUM_SUMMARY, VERDICTS, Summary

__all__ = ["Monitor", "Pending"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """A step whose numbers are on their way to the host."""

    step: int
    packed: Tensor
    """`[NUM_SUMMARY + W x NUM_FIELDS (+ W x P x 6)]` float64 in host memory, complete once `ready`."""
    ready: torch.cuda.Event | None
    rows: Tensor
    """`[P, 6]` on the device: this rank's statistics and the reduced sum of squares."""
    counts_tokens: bool


class Monitor:
    """Keeps the steps of the last `lag_steps` and turns older ones into records.

    Every rank reads the same steps at the same call, whatever has arrived, so that whoever acts on a record
    acts on all ranks at once.
    """

    def __init__(
        self, layout: Layout, *, group: dist.ProcessGroup | None, num_replicas: int, lag_steps: int
    ) -> None:
        self._layout = layout
        self._group = group
        self._num_replicas = num_replicas
        self._world_size = 1 if group is None else group.size()
        self._lag_steps = lag_steps
        self._pending: deque[Pending] = deque()

    def push(
        self,
        step: int,
        *,
        summary: Tensor,
        lanes: Tensor,
        rows: Tensor,
        all_rows: Tensor | None,
        counts_tokens: bool,
    ) -> None:
        """Starts the copy of a step's numbers to the host.

        Args:
            summary: `[NUM_SUMMARY]`, the decision.
            lanes: `[W, NUM_FIELDS]`.
            rows: `[P, 6]` of this rank, kept on the device for the case that the step was an incident.
            all_rows: `[W, P * 6]` of all ranks, if the record is to have a row per parameter anyway.
            counts_tokens: Whether the lanes' token counts were told by the caller.
        """
        parts = [summary, lanes.flatten()] + ([] if all_rows is None else [all_rows.flatten()])
        packed, ready = _to_host(torch.cat(parts))
        self._pending.append(
            Pending(step=step, packed=packed, ready=ready, rows=rows, counts_tokens=counts_tokens)
        )

    def drain(self, *, wait: bool) -> list[StepRecord]:
        """Records of all steps but the newest `lag_steps` (`wait`: of all), each once, in order.

        Waits for the copies. A skipped step costs one more collective, so all ranks have to call it alike.
        """
        records = []
        while self._pending and (wait or len(self._pending) > self._lag_steps):
            records.append(self._record(self._pending.popleft()))
        return records

    def clear(self) -> None:
        """Forgets what has not been drained."""
        self._pending.clear()

    def _record(self, pending: Pending) -> StepRecord:
        if pending.ready is not None:
            pending.ready.synchronize()
        values = pending.packed.tolist()
        summary = Summary(*values[:NUM_SUMMARY])
        end = NUM_SUMMARY + self._world_size * lane.NUM_FIELDS
        lanes = _chunks(values[NUM_SUMMARY:end], lane.NUM_FIELDS)
        rows = values[end:]
        if summary.verdict >= VERDICTS.index("skip") and not rows:
            rows = gather_lanes(pending.rows.flatten(), group=self._group).flatten().tolist()
        return _step_record(
            pending,
            summary,
            lanes,
            names=self._layout.names,
            per_parameter=self._parameter_rows(rows, summary.divisor),
        )

    def _parameter_rows(self, values: list[float], divisor: float) -> dict[str, ParameterRow]:
        if not values:
            return {}
        table = torch.tensor(values, dtype=torch.float64).view(
            self._num_replicas, -1, len(self._layout), NUM_COLUMNS + 1
        )
        shards = table[0, :, :, NUM_COLUMNS].sum(0).sqrt() / divisor
        ranks = table.flatten(0, 1)
        totals = ranks.sum(0)
        largest = ranks[:, :, MAX_ABS].amax(0) / divisor
        return {
            name: ParameterRow(
                grad_norm=float(shards[row]),
                max_abs=float(largest[row]),
                num_nan=_count(totals[row, NUM_NAN]),
                num_inf=_count(totals[row, NUM_INF]),
                num_zero=_count(totals[row, NUM_ZERO]),
                num_elements=self._layout.sizes[row],
            )
            for row, name in enumerate(self._layout.names)
        }


def _to_host(packed: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    if packed.device.type != "cuda":
        return packed.cpu(), None
    host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
    host.copy_(packed, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()
    return host, ready


def _step_record(
    pending: Pending,
    summary: Summary,
    lanes: list[list[float]],
    *,
    names: tuple[str, ...],
    per_parameter: dict[str, ParameterRow],
) -> StepRecord:
    culprit = _culprit(lanes)
    blamed = lanes[0] if culprit is None else lanes[culprit]
    parameter, micro_batch = int(blamed[lane.PARAMETER]), int(blamed[lane.MICRO_BATCH])
    return StepRecord(
        step=pending.step,
        verdict=VERDICTS[int(summary.verdict)],
        reason=_reason(summary, lanes, culprit),
        loss=summary.loss,
        grad_norm=summary.grad_norm,
        clip_coef=summary.clip_coef,
        num_tokens=int(sum(one[lane.TOKENS] for one in lanes)) if pending.counts_tokens else 0,
        num_nan=_count(sum(one[NUM_NAN] for one in lanes)),
        num_inf=_count(sum(one[NUM_INF] for one in lanes)),
        num_zero=_count(sum(one[NUM_ZERO] for one in lanes)),
        max_abs=max(one[MAX_ABS] for one in lanes) / summary.divisor,
        loss_scale=summary.loss_scale,
        rank=culprit,
        parameter=names[parameter] if parameter >= 0 else None,
        micro_batch=micro_batch if micro_batch >= 0 else None,
        per_rank=tuple(
            _rank_row(rank, values, summary.divisor, pending.counts_tokens)
            for rank, values in enumerate(lanes)
        ),
        per_parameter=per_parameter,
    )


def _rank_row(rank: int, values: list[float], divisor: float, counts_tokens: bool) -> RankRow:
    tokens = values[lane.TOKENS]
    return RankRow(
        rank=rank,
        loss=values[lane.LOSS_SUM] / tokens if tokens else math.nan,
        num_tokens=int(tokens) if counts_tokens else 0,
        grad_norm=math.sqrt(values[SUM_SQUARES]) / divisor,
        max_abs=values[MAX_ABS] / divisor,
        num_nan=_count(values[NUM_NAN]),
        num_inf=_count(values[NUM_INF]),
        num_zero=_count(values[NUM_ZERO]),
        compute_s=values[lane.COMPUTE_S],
        data_wait_s=values[lane.DATA_WAIT_S],
        stop_requested=bool(values[lane.STOP_REQUESTED]),
    )


def _is_bad(values: list[float]) -> bool:
    return bool(
        values[NUM_NAN]
        or values[NUM_INF]
        or values[lane.UNREDUCED]
        or not math.isfinite(values[lane.LOSS_SUM])
    )


def _culprit(lanes: list[list[float]]) -> int | None:
    """The rank to blame: the one that went bad in the earliest micro-batch, the lowest of several."""
    bad = [(values[lane.MICRO_BATCH], rank) for rank, values in enumerate(lanes) if _is_bad(values)]
    return min(bad)[1] if bad else None


def _reason(summary: Summary, lanes: list[list[float]], culprit: int | None) -> str | None:
    if culprit is not None:
        return _blame(lanes[culprit], culprit)
    if summary.verdict >= VERDICTS.index("skip"):
        if not sum(values[lane.TOKENS] for values in lanes):
            return "no tokens in the global batch"
        if any(values[lane.REDUCED_BAD] for values in lanes):
            return "the reduced gradient is not finite though every rank's own was: overflow in the reduction"
        return f"the gradient's norm is {summary.grad_norm:.3g}, too large for fp32"
    if summary.replicas_differ:
        return "the replicas' gradients differ after the reduction"
    return None


def _blame(values: list[float], rank: int) -> str:
    if values[lane.UNREDUCED]:
        return f"rank {rank}'s gradients were not reduced: its backward pass went around the wrapper"
    if not math.isfinite(values[lane.LOSS_SUM]):
        return f"the loss is {values[lane.LOSS_SUM]} on rank {rank}"
    return f"{_count(values[NUM_NAN])} NaN and {_count(values[NUM_INF])} Inf in the gradient of rank {rank}"


def _count(value: float | Tensor) -> int:
    """A count as an integer; -1: not measured."""
    value = float(value)
    return -1 if math.isnan(value) else int(value)


def _chunks(values: list[float], size: int) -> list[list[float]]:
    return [values[start : start + size] for start in range(0, len(values), size)]
