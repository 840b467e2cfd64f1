"""A queue by its methods, for programs that put their metrics into one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["MetricsQueue"]


class MetricsQueue:
    """Takes metrics that are put in, as `queue.Queue` does. Nothing waits in it: writing them down is quicker
    than queueing."""

    def __init__(self, log: Callable[[Any], None]) -> None:
        self._log = log

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Logs one training step; see `ExperimentTracker.log_training_step`. Never blocks."""
        self._log(item)

    def put_nowait(self, item: Any) -> None:
        """As `put`."""
        self._log(item)

    def qsize(self) -> int:
        """Always 0."""
        return 0

    def empty(self) -> bool:
        """Always true."""
        return True

    def full(self) -> bool:
        """Never."""
        return False

    def task_done(self) -> None:
        """Nothing is waited for."""

    def join(self) -> None:
        """Returns at once."""
