"""Signs of life of work that may take hours before the first step, such as preparing data.

A rank that starts has `watchdog.first_s` until the watchdog ends it. Each call of `still_working` begins that
time anew, so that only silence counts.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["num_signs", "still_working", "working"]

_EVERY_S = 1.0

_num_signs = 0


def still_working() -> None:
    """Something has been done, a few records or megabytes. Takes less than a microsecond."""
    global _num_signs
    _num_signs += 1


@contextmanager
def working() -> Iterator[None]:
    """Says so every second while the block runs: for one call that takes long, as a download does."""
    is_over = threading.Event()

    def say() -> None:
        still_working()
        while not is_over.wait(_EVERY_S):
            still_working()

    thread = threading.Thread(target=say, name="still-working", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def num_signs() -> int:
    """How often this process has said so; read by the watchdog's thread."""
    return _num_signs
