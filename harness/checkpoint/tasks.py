"""File work that nobody waits for: one task after the other, in a thread that lives while there are any."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

__all__ = ["Tasks"]

logger = logging.getLogger(__name__)


class Tasks:
    """Does what it is given in order. On a shared disk even an empty file can take seconds.

    Args:
        what: What it does, in words, for what is said if it fails.
        thread: Name of the thread.
    """

    def __init__(
        self, what: str = "looking after old checkpoints", *, thread: str = "checkpoint-tasks"
    ) -> None:
        self._what, self._thread = what, thread
        self._waiting: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._num_added = self._num_done = 0
        self._is_working = False

    def add(self, task: Callable[[], None]) -> None:
        """Hands a task over and raises nothing; the task should not raise, and what it raises is logged.

        If no thread can be started, the task waits for the next call of `add` or `join`.
        """
        with self._changed:
            self._waiting.append(task)
            self._num_added += 1
            self._start()

    def join(self, timeout_s: float | None = None) -> bool:
        """Waits until all is done that was given before this call, whatever comes after it; whether it is."""
        with self._changed:
            self._start()
            last = self._num_added
            self._changed.wait_for(lambda: self._num_done >= last or not self._is_working, timeout_s)
            return self._num_done >= last

    def _start(self) -> None:
        """Starts the thread if there is work and no thread; with the lock held."""
        if self._is_working or not self._waiting:
            return
        try:
            # A daemon: a disk that hangs must not keep the process from ending. `join` is called at exit.
            threading.Thread(target=self._work, name=self._thread, daemon=True).start()
            self._is_working = True
        except RuntimeError as error:
            logger.warning("%s has to wait: %s", self._what, error)

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._waiting:
                    self._is_working = False
                    self._changed.notify_all()
                    return
                task = self._waiting.popleft()
            try:
                task()
            except Exception as error:  # noqa: BLE001  (said; the tasks behind it are worth no less for that)
                logger.warning("%s failed: %s: %s", self._what, type(error).__name__, error)
            with self._changed:
                self._num_done += 1
                self._changed.notify_all()
