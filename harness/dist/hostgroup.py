"""A gloo group of one's own: exchanges on the hosts that never meet training's collectives."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from harness.errors import HarnessError

__all__ = ["HostGroup"]

T = TypeVar("T")
U = TypeVar("U")


class HostGroup:
    """All ranks, over gloo and host memory, on connections that nothing else uses.

    A thread may use a group of its own while training runs collectives on others; two threads may not share
    one. Making it is a collective. Without a process group it is rank 0 of 1 and every exchange is local.

    Args:
        error: What a failure that is not a `HarnessError` is raised as.
        timeout_s: How long an exchange waits for the slowest rank.
    """

    def __init__(self, *, error: type[HarnessError], timeout_s: float) -> None:
        self._error = error
        self.timeout_s = timeout_s
        self._group: Any = None
        self.rank, self.size = 0, 1
        if dist.is_available() and dist.is_initialized():
            self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))
            self.rank, self.size = dist.get_rank(), dist.get_world_size()

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def on_all_ranks(self, action: Callable[[], T]) -> T:
        """Runs `action` on every rank and gives each its own result, which need not be picklable.

        What fails on one rank fails on all: each raises the error of the lowest rank that had one.
        """
        outcome = self._attempt(action)
        failed = isinstance(outcome, HarnessError)
        for error in self._gather(outcome if failed else None):
            self._unwrap(error)
        result: T = self._unwrap(outcome)
        return result

    def gather(self, action: Callable[[], T]) -> list[T]:
        """Runs `action` on every rank and gives every rank all results, by rank; fails as `on_all_ranks` does."""
        return [self._unwrap(outcome) for outcome in self._gather(self._attempt(action))]

    def from_main(self, action: Callable[[], T]) -> T:
        """Runs `action` on rank 0 and gives its result, or raises its error, on every rank."""
        outcome = self._attempt(action) if self.is_main else None
        if self.size > 1:
            holder = [outcome]
            dist.broadcast_object_list(holder, src=0, group=self._group)
            outcome = holder[0]
        result: T = self._unwrap(outcome)
        return result

    def through_main(self, value: T, action: Callable[[list[T]], Sequence[U]]) -> U:
        """Gathers every rank's `value` on rank 0, runs `action` there and gives each rank its own result."""
        if self.size == 1:
            return action([value])[0]
        values: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(value, values, dst=0, group=self._group)
        shares: list[Any] | None = None
        if values is not None:
            outcome = self._attempt(lambda: action(values))
            shares = [outcome] * self.size if isinstance(outcome, HarnessError) else list(outcome)
        mine: list[Any] = [None]
        dist.scatter_object_list(mine, shares, src=0, group=self._group)
        result: U = self._unwrap(mine[0])
        return result

    def _attempt(self, action: Callable[[], T]) -> T | HarnessError:
        """What `action` returns, or its error: a rank that left here would keep the others waiting."""
        try:
            return action()
        except HarnessError as error:
            return error
        except Exception as error:  # noqa: BLE001  (raised again, on every rank)
            where = f"rank {self.rank}: " if self.size > 1 else ""
            described = self._error(f"{where}{type(error).__name__}: {error}")
            described.__cause__ = error
            return described

    def _gather(self, outcome: Any) -> list[Any]:
        if self.size == 1:
            return [outcome]
        outcomes: list[Any] = [None] * self.size
        dist.all_gather_object(outcomes, outcome, group=self._group)
        return outcomes

    @staticmethod
    def _unwrap(outcome: Any) -> Any:
        if isinstance(outcome, HarnessError):
            raise outcome
        return outcome
