"""From numbers on the device to step records on the host, a fixed number of steps later.

This is the one place where the guard's numbers are read back.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from harness.dist.collectives import all_gather
from harness.records import StepRecord
from harness.stability.before import WEIGHTS, weights_not_finite
from harness.stability.checks.all import Checks
from harness.stability.checks.rows import ROWS
from harness.stability.device_step import StepOutput
from harness.stability.host_copy import HostCopy, is_capturing
from harness.stability.layout import Layout
from harness.stability.packing import Packet, Spec, can_be_gathered, pack, unpack
from harness.stability.record_builder import RecordBuilder, is_notable, is_skip, summary_of

__all__ = ["Monitor", "Settled"]


logger = logging.getLogger(__name__)

RECORD_BYTES = 4096
"""What a step takes beside its numbers: Python's objects, the pages of its memory."""

MAX_PENDING_BYTES = 64 << 20
"""Of steps that nobody drains, on the device and on the host together."""


@dataclass(slots=True, kw_only=True)
class _Pending:
    """A step whose numbers are on their way to the host."""

    step: int
    copy: HostCopy
    """The packed numbers."""
    spec: Spec
    layout: Layout
    """What the rows are of."""
    rows: Tensor
    """`[P, 6]` on the device, this rank's, in case the step turns out to be an incident."""
    counts_tokens: bool
    size_bytes: int
    rows_of_all: Tensor | None = None
    """`[W, P, 6]` on the host, of a skipped step that was settled."""
    weights_of_all: Tensor | None = None
    """`[W, 2]` on the host, `weights_not_finite` of each rank, of a step without a finite loss."""
    record: StepRecord | None = None
    """Where it was asked for already."""
    is_settled: bool = False

    def packet(self) -> Packet:
        """The numbers, on the host. Waits for them."""
        packet = unpack(self.copy.wait(), self.spec)
        later = {ROWS: self.rows_of_all, WEIGHTS: self.weights_of_all}
        return packet | {name: tensor for name, tensor in later.items() if tensor is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What has to be known of every step, whether or not anybody asks for its record. Equal on all ranks."""

    step: int
    skipped: bool
    clip_coef: float
    record: StepRecord | None
    """Of a step about which there is something to say."""


class Monitor:
    """Keeps the steps of the last `lag_steps` and turns older ones into records.

    Each step is settled once, by all ranks at the same call and whatever has arrived, so that whoever acts on
    a step acts on all ranks at once. Records are then this rank's own affair. Of steps whose records nobody
    asks for it keeps the newest, `MAX_PENDING_BYTES` of them.
    """

    def __init__(
        self, *, group: dist.ProcessGroup | None, num_replicas: int, lag_steps: int, checks: Checks
    ) -> None:
        self._checks = checks
        self._group = group
        self._num_replicas = num_replicas
        self._lag_steps = lag_steps
        self._pending: deque[_Pending] = deque()
        """Steps without a record, or whose record nobody has asked for yet."""
        self._unsettled: deque[_Pending] = deque()
        self._idle: dict[int, list[HostCopy]] = {}
        """Copies that were read, by their size: pinned memory is costly to ask for."""
        self._pending_bytes = 0
        self._has_dropped = False

    def push(self, step: int, output: StepOutput) -> None:
        """Starts the copy of a step's numbers to the host."""
        flat, spec = pack(output.packet)
        pending = _Pending(
            step=step,
            copy=self._copied(flat),
            spec=spec,
            layout=output.layout,
            rows=output.rows,
            counts_tokens=output.counts_tokens,
            size_bytes=flat.nbytes + output.rows.nbytes + RECORD_BYTES,
        )
        self._pending.append(pending)
        self._unsettled.append(pending)
        self._pending_bytes += pending.size_bytes

    def settle(self, *, wait: bool = False) -> Iterator[Settled]:
        """Settles all steps but the newest `lag_steps` (`wait`: all), in order.

        Waits for their copies. All ranks have to call it alike: a skipped step costs one more collective.
        Within a CUDA graph that is being recorded there is nothing to read.
        """
        if is_capturing():
            return
        while self._unsettled and (wait or len(self._unsettled) > self._lag_steps):
            yield self._settled(self._unsettled.popleft())
        while self._pending_bytes > MAX_PENDING_BYTES and len(self._pending) > self._lag_steps + 1:
            self._drop()

    def drain(self, *, wait: bool) -> list[StepRecord]:
        """Records of all steps that are settled (`wait`: of all, for whose copies it waits), each once, in
        order. A skipped step that is not settled has no rows in it, unless this rank is alone."""
        records = []
        while self._pending and (wait or self._pending[0].is_settled):
            pending = self._pending.popleft()
            self._pending_bytes -= pending.size_bytes
            records.append(self._record(pending))
            self._give_back(pending)
        return records

    def clear(self) -> None:
        """Forgets what has not been drained."""
        self._pending.clear()
        self._unsettled.clear()
        self._pending_bytes = 0

    def _settled(self, pending: _Pending) -> Settled:
        packet = pending.packet()
        summary = summary_of(packet)
        if is_skip(summary) and ROWS not in packet and self._can_gather(pending.rows):
            rows = all_gather(pending.rows.flatten(), group=self._group)
            pending.rows_of_all = rows.view(-1, *pending.rows.shape).cpu()
        if is_skip(summary) and not math.isfinite(summary.loss):
            # Broken weights make every loss NaN; those of a step that was left out are still there.
            weights = all_gather(weights_not_finite(pending.layout), group=self._group)
            pending.weights_of_all = weights.cpu()
        pending.is_settled = True
        return Settled(
            step=pending.step,
            skipped=is_skip(summary),
            clip_coef=summary.clip_coef,
            record=self._record(pending) if is_notable(summary, packet) else None,
        )

    def _can_gather(self, rows: Tensor) -> bool:
        return self._group is None or can_be_gathered(rows.numel(), num_ranks=self._group.size())

    def _record(self, pending: _Pending) -> StepRecord:
        if pending.record is not None:
            return pending.record
        packet = pending.packet()
        was_skipped = is_skip(summary_of(packet))
        if self._group is None and was_skipped:
            packet.setdefault(ROWS, pending.rows.cpu()[None])
        builder = RecordBuilder(pending.layout, num_replicas=self._num_replicas, checks=self._checks)
        record = builder.build(pending.step, packet, counts_tokens=pending.counts_tokens)
        if ROWS in packet or not was_skipped:
            pending.record = record  # all that there will be to know
        return record

    def _drop(self) -> None:
        pending = self._pending.popleft()
        self._pending_bytes -= pending.size_bytes
        self._give_back(pending)
        if not self._has_dropped:
            logger.warning(
                "guard.drain() was not called for %d steps: from step %d on the oldest are dropped. Call it "
                "after each step and look at the records: they say what was skipped and why",
                len(self._pending),
                pending.step,
            )
        self._has_dropped = True

    def _give_back(self, pending: _Pending) -> None:
        if pending.is_settled:  # else its numbers are read once more
            self._idle.setdefault(pending.copy.numel, []).append(pending.copy)

    def _copied(self, flat: Tensor) -> HostCopy:
        idle = self._idle.get(flat.numel())
        if not idle:
            return HostCopy(flat)
        copy = idle.pop()
        copy.start(flat)
        return copy
