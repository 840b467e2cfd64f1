"""Callbacks that stop or delay rank 1, for runs with a watchdog."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from harness.config import TrainConfig
from harness.training import Callback

__all__ = ["hangs", "is_slow", "stops"]


def stops(config: TrainConfig) -> Callback:
    """It is stopped in the backward pass of step 5, as from outside."""
    return _InBackward(lambda: os.kill(os.getpid(), signal.SIGSTOP))


def hangs(config: TrainConfig) -> Callback:
    """It waits for ever in that backward pass, while rank 0 waits in its own for the reduction."""
    return _InBackward(lambda: threading.Event().wait())


def is_slow(config: TrainConfig) -> Callback:
    """It takes its time after an evaluation, while rank 0 waits in the next step."""
    return _Slow()


class _InBackward(Callback):
    def __init__(self, action: Callable[[], object]) -> None:
        self._action = action

    def on_step(self, run: Any, record: Any) -> None:
        if record.step == 4 and run.world.rank == 1:
            next(run.model.parameters()).register_hook(lambda gradient: self._action())


class _Slow(Callback):
    def on_eval(self, run: Any, step: int, metrics: Any) -> None:
        if step == 4 and run.world.rank == 1:
            time.sleep(3.5)
