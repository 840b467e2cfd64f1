"""From numbers on the device to step records on the host, a fixed number of steps later.

This is the one place where the guard's numbers are read back.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from harness.dist.collectives import all_gather
from harness.errors import ConfigError
from harness.records import StepRecord
from harness.stability.checks.all import Checks
from harness.stability.checks.rows import ROWS
from harness.stability.host_copy import HostCopy
from harness.stability.layout import Layout
from harness.stability.packing import Packet, Spec, pack, unpack
from harness.stability.rank_statistics import DRAINED
from harness.stability.record_builder import RecordBuilder, is_skip

__all__ = ["Monitor"]


logger = logging.getLogger(__name__)

RECORD_BYTES = 4096
"""What a step takes beside its numbers: Python's objects, the pages of its memory."""

MAX_PENDING_BYTES = 64 << 20
"""Of steps that nobody drains, on the device and on the host together."""


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
    size_bytes: int


class Monitor:
    """Keeps the steps of the last `lag_steps` and turns older ones into records.

    Of steps that are never drained it keeps the newest, `MAX_PENDING_BYTES` of them.

    Every rank reads the same steps at the same call, whatever has arrived, so that whoever acts on a record
    acts on all ranks at once.
    """

    def __init__(
        self, *, group: dist.ProcessGroup | None, num_replicas: int, lag_steps: int, checks: Checks
    ) -> None:
        self._checks = checks
        self._group = group
        self._num_replicas = num_replicas
        self._lag_steps = lag_steps
        self._pending: deque[_Pending] = deque()
        self._idle: dict[int, list[HostCopy]] = {}
        """Copies that were read, by their size: pinned memory is costly to ask for."""
        self._num_pushed, self._num_dropped = 0, 0
        self._pending_bytes = 0
        self._unchecked: deque[_Pending] = deque()
        self.num_drained = 0
        """How far `drain` was called for, in steps since the start and plus the lag; 0: never. It goes to the
        other ranks with each step."""

    def push(self, step: int, packet: Packet, *, layout: Layout, rows: Tensor, counts_tokens: bool) -> None:
        """Starts the copy of a step's numbers to the host.

        Args:
            packet: What `RecordBuilder.build` reads.
            layout: Which parameter is which row.
            rows: `[P, 6]`, this rank's statistics and the reduced sums of squares.
            counts_tokens: Whether the token counts are the caller's, and not a count of losses.

        Raises:
            ConfigError: not all ranks had called `drain` alike before a step that has arrived by now.
        """
        flat, spec = pack(packet)
        pending = _Pending(
            step=step,
            copy=self._copied(flat),
            spec=spec,
            layout=layout,
            rows=rows,
            counts_tokens=counts_tokens,
            size_bytes=flat.nbytes + rows.nbytes + RECORD_BYTES,
        )
        self._num_pushed += 1
        self._pending.append(pending)
        self._unchecked.append(pending)
        self._pending_bytes += pending.size_bytes
        while self._pending_bytes > MAX_PENDING_BYTES and len(self._pending) > self._lag_steps + 1:
            self._drop()
        self._check_arrived()

    def drain(self, *, wait: bool) -> list[StepRecord]:
        """Records of all steps but the newest `lag_steps` (`wait`: of all), each once, in order.

        Waits for the copies. A skipped step costs one more collective, so all ranks have to call it alike.

        Raises:
            ConfigError: not all ranks have called it alike.
        """
        records = []
        while self._pending and (wait or len(self._pending) > self._lag_steps):
            if not wait and self._is_first_call and self._needs_rows(self._pending[0]):
                break  # with the next step every rank will know whether all have made it
            records.append(self._record(self._take()))
        self.num_drained = self._num_pushed + (self._lag_steps if wait else 0)
        return records

    def clear(self) -> None:
        """Forgets what has not been drained, and who has called `drain`."""
        self._pending.clear()
        self._unchecked.clear()
        self._num_pushed = self._pending_bytes = self.num_drained = 0

    @property
    def _is_first_call(self) -> bool:
        """Whether nobody can know yet that this rank drains. Without a lag nothing could be put off."""
        return self._group is not None and self._lag_steps > 0 and not self.num_drained

    def _take(self) -> _Pending:
        pending = self._pending.popleft()
        self._pending_bytes -= pending.size_bytes
        return pending

    def _drop(self) -> None:
        pending = self._take()
        self._give_back(pending.copy)
        if not self._num_dropped:
            logger.warning(
                "guard.drain() was not called for %d steps: from step %d on the oldest are dropped. Call it "
                "after each step, on all ranks, and look at the records: they say what was skipped and why",
                len(self._pending),
                pending.step,
            )
        self._num_dropped += 1

    def _check_arrived(self) -> None:
        """Looks whether all ranks had called `drain` alike, in the steps that have arrived. Does not wait."""
        while self._unchecked and self._unchecked[0].copy.arrived:
            self._check(self._unchecked.popleft())

    def _check(self, pending: _Pending) -> None:
        if self._group is None:
            return
        statistics = unpack(pending.copy.wait(), pending.spec)["rank_statistics"]
        num_drained = statistics[:, DRAINED].tolist()
        behind = [rank for rank, drained in enumerate(num_drained) if drained < max(num_drained)]
        if behind:
            ahead = [rank for rank in range(len(num_drained)) if rank not in behind]
            raise ConfigError(
                f"before step {pending.step} drain() was called on ranks {_listed(ahead)}, but not on ranks "
                f"{_listed(behind)}",
                rule="all ranks call it at the same steps, because a skipped step is read together",
                remedy="call drain() on every rank and let rank 0 alone print or log the records",
            )

    def _record(self, pending: _Pending) -> StepRecord:
        flat = pending.copy.wait()
        self._check_arrived()
        packet = unpack(flat, pending.spec)
        if self._needs_rows(pending):
            packet[ROWS] = self._rows_of_all_ranks(pending.rows)
        builder = RecordBuilder(pending.layout, num_replicas=self._num_replicas, checks=self._checks)
        record = builder.build(pending.step, packet, counts_tokens=pending.counts_tokens)
        self._give_back(pending.copy)
        return record

    def _needs_rows(self, pending: _Pending) -> bool:
        """Whether to read the step takes a collective."""
        packet = unpack(pending.copy.wait(), pending.spec)
        return is_skip(packet) and ROWS not in packet

    def _rows_of_all_ranks(self, rows: Tensor) -> Tensor:
        """`[W, P, 6]` on the host. First waits for the latest step, which says who else drains."""
        while self._unchecked:
            self._check(self._unchecked.popleft())
        try:
            everywhere = all_gather(rows.flatten(), group=self._group)
        except RuntimeError as error:
            raise ConfigError(
                f"the rows of a skipped step could not be gathered: {str(error).splitlines()[0]}",
                rule="drain() takes all ranks, at the same steps",
                remedy="call drain() on every rank and let rank 0 alone print or log the records",
            ) from error
        return everywhere.view(-1, *rows.shape).cpu()

    def _give_back(self, copy: HostCopy) -> None:
        self._idle.setdefault(copy.numel, []).append(copy)

    def _copied(self, flat: Tensor) -> HostCopy:
        idle = self._idle.get(flat.numel())
        if not idle:
            return HostCopy(flat)
        copy = idle.pop()
        copy.start(flat)
        return copy


def _listed(ranks: list[int], most: int = 8) -> str:
    return ", ".join(map(str, ranks[:most])) + (f" and {len(ranks) - most} more" if len(ranks) > most else "")
