"""From numbers on the device to step records on the host, a fixed number of steps later.

This is the one place where the guard's numbers are read back.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from harness.dist.collectives import gather_lanes
from harness.records import StepRecord
from harness.stability.host_copy import HostCopy
from harness.stability.layout import Layout
from harness.stability.packing import Packet, Spec, pack, unpack
from harness.stability.reading import Reader

__all__ = ["Monitor"]


@dataclass(frozen=True, slots=True, kw_only=True)
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


class Monitor:
    """Keeps the steps of the last `lag_steps` and turns older ones into records.

    Every rank reads the same steps at the same call, whatever has arrived, so that whoever acts on a record
    acts on all ranks at once.
    """

    def __init__(self, *, group: dist.ProcessGroup | None, num_replicas: int, lag_steps: int) -> None:
        self._group = group
        self._num_replicas = num_replicas
        self._lag_steps = lag_steps
        self._pending: deque[_Pending] = deque()
        self._idle: dict[int, list[HostCopy]] = {}
        """Copies that were read, by their size: pinned memory is costly to ask for."""

    def push(self, step: int, packet: Packet, *, layout: Layout, rows: Tensor, counts_tokens: bool) -> None:
        """Starts the copy of a step's numbers to the host.

        Args:
            packet: What `Reader.record` reads.
            layout: Which parameter is which row.
            rows: `[P, 6]`, this rank's statistics and the reduced sums of squares.
            counts_tokens: Whether the lanes' token counts were told by the caller.
        """
        flat, spec = pack(packet)
        self._pending.append(
            _Pending(
                step=step,
                copy=self._copied(flat),
                spec=spec,
                layout=layout,
                rows=rows,
                counts_tokens=counts_tokens,
            )
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

    def _record(self, pending: _Pending) -> StepRecord:
        flat = pending.copy.wait()
        packet = unpack(flat, pending.spec)
        reader = Reader(pending.layout, num_replicas=self._num_replicas)
        if reader.is_skip(packet) and "rows" not in packet:
            rows = gather_lanes(pending.rows.flatten(), group=self._group)
            packet["rows"] = rows.view(-1, *pending.rows.shape).cpu()
        record = reader.record(pending.step, packet, counts_tokens=pending.counts_tokens)
        self._idle.setdefault(flat.numel(), []).append(pending.copy)
        return record

    def _copied(self, flat: Tensor) -> HostCopy:
        idle = self._idle.get(flat.numel())
        if not idle:
            return HostCopy(flat)
        copy = idle.pop()
        copy.start(flat)
        return copy
