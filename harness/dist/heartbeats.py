"""What ranks tell each other while they train: a word from each every few seconds, through the store.

On a thread and a connection of its own, as the store may live in a process that hangs, and a call would wait for it.
Every rank writes one key and looks for one; a few read the words of all, and whoever raises the alarm collects what
all ranks have to say then.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from harness.dist.store import default_store, has_group

__all__ = ["Heartbeats"]

_ALARM, _REPORT, _ENDED = "alarm", "report", "ended"
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 1.0
_LAST_READS_S = 0.2
"""How much longer rank 0 stays: the store may live in its process."""


class Heartbeats:
    """This rank's words to the others, and theirs.

    Args:
        beat_s: Time between two exchanges.
    """

    def __init__(self, beat_s: float) -> None:
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if has_group() else (0, 1)
        self.listens = self.rank in (0, self.size // 2, self.size - 1)
        """Whether it is one of those that hear all others; they are on different machines, if there are any."""
        self.word = ""
        """What to tell the others."""
        self.heard: list[str] = []
        """Their last words, by rank; empty as long as one of them has not spoken."""
        self.alarm: str | None = None
        """What a rank that raised the alarm said."""
        self.num_beats = 0
        """Exchanges with the store so far: it does not answer if they grow no more."""
        self._beat_s = beat_s
        self._store: Any = default_store() or dist.HashStore()  # type: ignore[attr-defined]  # there at run time
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)

    def start(self) -> None:
        """Begins; no collective, and the store is not waited for."""
        self._thread.start()

    def close(self) -> None:
        """Falls silent. Waits a second at most, for the store may not answer."""
        self._closed.set()
        self._thread.join(1.0)

    def raise_alarm(self, text: str) -> bool:
        """Asks all ranks for an answer; False if another rank has asked already."""
        said: bytes = self._store.compare_set(_ALARM, "", text)
        return said.decode() == text

    def answer(self, text: str) -> None:
        """What this rank says when there is an alarm."""
        self._store.set(f"answer/{self.rank}", text)

    def answers(self, ranks: list[int], timeout_s: float) -> dict[int, str]:
        """What those of `ranks` said that have answered in time."""
        keys = [f"answer/{rank}" for rank in ranks]
        _poll(lambda: self._store.check(keys), timeout_s)
        found = [rank for rank, key in zip(ranks, keys, strict=True) if self._store.check([key])]
        return {rank: self._store.get(f"answer/{rank}").decode() for rank in found}

    def publish(self, text: str) -> None:
        """What has been found out, for all ranks."""
        self._store.set(_REPORT, text)

    def report(self, timeout_s: float) -> str | None:
        """What has been found out; None if that does not come in time."""
        with suppress(dist.DistError, RuntimeError):
            if _poll(lambda: self._store.check([_REPORT]), timeout_s):
                found: bytes = self._store.get(_REPORT)
                return found.decode()
        return None

    def leave_together(self, timeout_s: float) -> None:
        """Rank 0 has written down how the run ended, and the others wait for that: with the first rank that
        leaves, launchers end all of them."""
        with suppress(dist.DistError, RuntimeError):  # the store is gone, and rank 0 with it
            if self.rank == 0:
                self._store.set(_ENDED, "")
                time.sleep(_LAST_READS_S)
            else:
                _poll(lambda: self._store.check([_ENDED]), timeout_s)

    def _run(self) -> None:
        with suppress(dist.DistError, RuntimeError):  # the store is gone: nobody is heard any more
            self._store = dist.PrefixStore("harness/watchdog", self._store.clone())  # type: ignore[attr-defined]
            self._exchange()  # at once: a rank that has never spoken cannot be told from one that is missing
            while not self._closed.wait(self._beat_s):
                self._exchange()

    def _exchange(self) -> None:
        self._store.set(f"word/{self.rank}", self.word)
        if self.listens:
            words = [f"word/{rank}" for rank in range(self.size)]
            if self.heard or self._store.check(words):
                self.heard = [word.decode() for word in self._store.multi_get(words)]
        if self._store.check([_ALARM]):
            self.alarm = self._store.get(_ALARM).decode()
        self.num_beats += 1


def _poll(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Whether the condition came to hold in time; asks ever more seldom, for there may be thousands of ranks."""
    ends, pause_s = time.monotonic() + timeout_s, _FIRST_PAUSE_S
    while not condition():
        if time.monotonic() > ends:
            return False
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
    return True
