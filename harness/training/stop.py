"""Ctrl-C and SIGTERM: finish the step, commit a checkpoint, leave. A second Ctrl-C leaves at once."""

from __future__ import annotations

import logging
import os
import signal
from types import FrameType
from typing import Any

__all__ = ["StopRequest"]

_ABORTED_BY_CTRL_C = 128 + signal.SIGINT

logger = logging.getLogger(__name__)


class StopRequest:
    """Notes the first SIGINT or SIGTERM; a context manager that gives the old handlers back.

    The request of one rank reaches all others with the guard's gather, so that all leave at the same step.
    """

    def __init__(self) -> None:
        self.requested = False
        self._interrupts = 0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # A launcher passes a terminal's Ctrl-C on as SIGTERM: only a second SIGINT is a second Ctrl-C.
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            os._exit(_ABORTED_BY_CTRL_C)
        if not self.requested:
            logger.warning(
                "%s: finishing the step and saving a checkpoint; Ctrl-C again ends at once",
                signal.Signals(number).name,
            )
        self.requested = True
