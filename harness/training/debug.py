"""Debug mode: the first bad number opens a debugger where it was made."""

from __future__ import annotations

import dataclasses
import pdb
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from harness.config import TrainConfig
from harness.errors import TaskError
from harness.records import StepRecord
from harness.training.callbacks import Callback, Training

__all__ = ["Debugger", "debugging", "with_every_check"]


def with_every_check(config: TrainConfig) -> TrainConfig:
    """`config` with verdicts read in their own step, and every measurement made in every step."""
    guard = dataclasses.replace(
        config.guard, lag_steps=0, extremes_every=1, per_parameter_every=1, sample_every=1
    )
    return dataclasses.replace(config, guard=guard)


@contextmanager
def debugging(on: bool) -> Iterator[None]:
    """Within it autograd names the forward call that made a NaN, and an exception opens the debugger."""
    if not on:
        yield
        return
    with torch.autograd.set_detect_anomaly(True):
        try:
            yield
        except Exception as error:
            if sys.stdin.isatty():
                cause = error.__cause__ if isinstance(error, TaskError) else None
                pdb.post_mortem((cause or error).__traceback__)
            raise


class Debugger(Callback):
    """Opens the debugger at an incident, where there is a terminal to type at."""

    def on_step(self, run: Training, record: StepRecord) -> None:
        if record.reason is not None and sys.stdin.isatty():
            pdb.set_trace(header=f"step {record.step}: {record.reason}")
