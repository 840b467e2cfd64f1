"""Which checkpoints have proved themselves: healthy are those that enough clean steps have followed."""

from __future__ import annotations

import logging
import threading

from harness.checkpoint.store import Saved, Store

__all__ = ["Health"]

logger = logging.getLogger(__name__)


class Health:
    """Follows a run's steps and promotes its checkpoints.

    A checkpoint of step s is healthy once k steps have been observed after it and the last k steps observed
    were all without incident. The ranks count alike; rank 0 alone writes the promotion down.

    Args:
        healthy_after: k.
        is_main: Whether this is rank 0.
    """

    def __init__(self, store: Store, *, healthy_after: int, is_main: bool) -> None:
        self._store, self._healthy_after, self._is_main = store, healthy_after, is_main
        self._clean_since: int | None = None
        self._pending: list[Saved] | None = None
        self._lock = threading.Lock()  # commits come from the writer's thread

    def observe(self, step: int, *, incident: bool) -> int | None:
        """Counts a step; gives the newest step that has proved itself by now, or None."""
        if self._clean_since is None:
            self._clean_since = step - 1
        if incident:
            self._clean_since = step
        if step - self._clean_since < self._healthy_after:
            return None
        proved = step - self._healthy_after
        if self._is_main:
            self._promote(proved)
        return proved

    def restart(self) -> None:
        """Forgets the steps seen, as after a rollback."""
        self._clean_since = None
        with self._lock:
            self._pending = None

    def committed(self, saved: Saved) -> None:
        """Notes a new checkpoint."""
        with self._lock:
            if self._pending is not None:
                self._pending.append(saved)

    def _promote(self, proved: int) -> None:
        try:
            with self._lock:
                if self._pending is None:
                    self._pending = [saved for saved in self._store.saved() if not saved.healthy]
                due = [saved for saved in self._pending if saved.step <= proved]
                for saved in due:
                    if saved.path.exists():
                        self._store.mark_healthy(saved)
                    self._pending.remove(saved)
        except OSError as error:
            logger.warning("a checkpoint could not be marked as healthy: %s", error)
