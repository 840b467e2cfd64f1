"""Which checkpoints have proved themselves: healthy are those that enough clean steps have followed."""

from __future__ import annotations

import logging
import math
import time

from harness.checkpoint.store import Saved, Store
from harness.checkpoint.tasks import Tasks

__all__ = ["Health"]

logger = logging.getLogger(__name__)

RETRY_S = 30.0
"""How long a failed promotion waits, so that a disk in trouble is not complained of at every step."""


class Health:
    """Follows a run's steps and promotes its checkpoints.

    A checkpoint of step s is healthy once k steps have been observed after it and the last k steps observed
    were all without incident. The ranks count alike; rank 0 alone writes the promotion down, among `tasks`.

    Args:
        healthy_after: k.
        is_main: Whether this is rank 0.
    """

    def __init__(self, store: Store, tasks: Tasks, *, healthy_after: int, is_main: bool) -> None:
        self._store, self._tasks, self._healthy_after, self._is_main = store, tasks, healthy_after, is_main
        self._clean_since: int | None = None
        # Looked at by the training thread, replaced as a whole by tasks.
        self._pending: tuple[Saved, ...] | None = None
        self._proved = -1
        self._is_queued = False
        """Whether a promotion is among the tasks and has not begun; there is one at most."""
        self._retry_at = -math.inf

    def observe(self, step: int, *, incident: bool) -> int | None:
        """Counts a step; gives the newest step that has proved itself by now, or None. Touches no file."""
        if self._clean_since is None:
            self._clean_since = step - 1
        if incident:
            self._clean_since = step
        if step - self._clean_since < self._healthy_after:
            return None
        proved, pending = step - self._healthy_after, self._pending
        if self._is_main and (pending is None or any(saved.step <= proved for saved in pending)):
            self._proved = proved  # before the look at the queue: a promotion that begins now sees this step
            if not self._is_queued and time.monotonic() >= self._retry_at:
                self._is_queued = True
                self._tasks.add(self._promote)
        return proved

    def restart(self) -> None:
        """Forgets the steps seen, as after a rollback; no task may be under way."""
        self._clean_since = None
        self._pending = None

    def committed(self, saved: Saved) -> None:
        """Notes a new checkpoint; as a task."""
        if self._pending is not None and saved not in self._pending:
            self._pending = (*self._pending, saved)

    def _promote(self) -> None:
        self._is_queued = False
        proved = self._proved
        try:
            pending = self._pending
            if pending is None:
                pending = tuple(saved for saved in self._store.saved() if not saved.healthy)
            for saved in pending:
                if saved.step <= proved and saved.path.exists():
                    self._store.mark_healthy(saved)
            self._pending = tuple(saved for saved in pending if saved.step > proved)
        except OSError as error:
            self._retry_at = time.monotonic() + RETRY_S
            logger.warning(
                "a checkpoint could not be marked as healthy, it is tried again in %.0f s: %s", RETRY_S, error
            )
