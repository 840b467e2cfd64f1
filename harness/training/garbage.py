"""Python's cyclic garbage, collected at set steps rather than whenever.

Left to itself, each rank's collector strikes at moments of its own, and as all wait for the slowest in every
step, they pay for each other's pauses. Most of what it looks through has been there since the start, so that
is set aside once (`gc.freeze`), when the first steps have made what lasts.
"""

from __future__ import annotations

import gc
from types import TracebackType
from typing import Self

__all__ = ["GarbageCollection"]

_NUM_FIRST = 3
"""Steps after which what lasts has been made: optimizer state, buckets, compiled code."""


class GarbageCollection:
    """Within it garbage is collected when `after_step` says so. A context manager, in the training thread.

    Args:
        every: Steps between two collections; 0: Python decides.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._num_steps = 0
        self._was_enabled = gc.isenabled()

    def __enter__(self) -> Self:
        if self._every:
            gc.disable()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._every:
            gc.unfreeze()  # a model that is left to the end of the process group may abort it
            if self._was_enabled:
                gc.enable()

    def after_step(self, step: int) -> None:
        """To be called on all ranks after the same steps; `step` counts the finished ones."""
        self._num_steps += 1
        if not self._every:
            return
        if self._num_steps == _NUM_FIRST:
            gc.collect()
            gc.freeze()
        elif step % self._every == 0:
            gc.collect()
