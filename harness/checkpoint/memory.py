"""The last good state in host memory, so that a rollback needs no disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from harness.checkpoint.adapters import Adapter, Spec
from harness.checkpoint.capture import Captured
from harness.checkpoint.hostcopy import copy_to_host
from harness.checkpoint.staging import local
from harness.errors import CheckpointError

__all__ = ["Memory", "Snapshot"]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that one rank holds, as it was at `step`; a source of state for this very rank."""

    step: int
    captured: Captured
    tensors: dict[str, torch.Tensor]
    """Copies on the host; of DTensors, the local part."""

    def donor(self, rank: int) -> int:
        """The world has not changed."""
        return rank

    def holds(self, part: Adapter) -> bool:
        """Whether anything was saved under the part's key."""
        return part.key in (self.captured.rank_state if part.per_rank else self.captured.state)

    def description(self, part: Adapter, rank: int) -> Any:
        """What was saved under the part's key."""
        kept = self.captured.rank_state if part.per_rank else self.captured.state
        if part.key not in kept:
            raise CheckpointError(
                f"the state in memory has no {part.key!r}", rule=f"it has {', '.join(kept)}"
            )
        return kept[part.key]

    def spec(self, name: str) -> Spec:
        """Shape and dtype of a whole tensor."""
        return self.captured.specs[name]

    def read(self, targets: Mapping[str, torch.Tensor]) -> None:
        """Copies back."""
        for name, target in targets.items():
            local(target).copy_(self.tensors[name], non_blocking=True)


class Memory:
    """Snapshots whose memory is used again and again: the good one, and at most two that are pending.

    Of the pending ones the oldest stays, for it is the first to prove itself; the newest makes room.
    """

    def __init__(self) -> None:
        self.good: Snapshot | None = None
        self._pending: list[Snapshot] = []
        self._spare: list[dict[str, torch.Tensor]] = []

    def take(self, step: int, captured: Captured) -> Snapshot:
        """Copies the whole state of this rank. Blocks until the copy is complete."""
        if len(self._pending) > 1:
            self._spare.append(self._pending.pop().tensors)
        room = self._spare.pop() if self._spare else {}
        sources = {name: local(tensor) for name, tensor in captured.live.items()}
        tensors = {name: _room_for(source, room.get(name)) for name, source in sources.items()}
        copy_to_host([(tensors[name], source) for name, source in sources.items()])
        snapshot = Snapshot(step, captured.without_tensors(), tensors)
        self._pending.append(snapshot)
        return snapshot

    def promote(self, proved: int) -> None:
        """The newest snapshot of step `proved` or earlier is the good one now."""
        due = [snapshot for snapshot in self._pending if snapshot.step <= proved]
        if due:
            outdated = [*due[:-1], *([self.good] if self.good else [])]
            self._spare.extend(snapshot.tensors for snapshot in outdated)
            self.good = due[-1]
            self._pending = self._pending[len(due) :]

    def clear(self, *, keep_good: bool = False) -> None:
        """Forgets what has not proved itself, and unless told otherwise the good one too."""
        forgotten = list(self._pending)
        self._pending.clear()
        if self.good is not None and not keep_good:
            forgotten.append(self.good)
            self.good = None
        self._spare.extend(snapshot.tensors for snapshot in forgotten)


def _room_for(source: torch.Tensor, room: torch.Tensor | None) -> torch.Tensor:
    if room is not None and room.shape == source.shape and room.dtype == source.dtype:
        return room
    return torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
