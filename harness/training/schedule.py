"""The learning rate as a function of the step, so that there is no state to restore."""

from __future__ import annotations

import math

from harness.config import ScheduleConfig

__all__ = ["learning_rate"]


def learning_rate(step: int, *, peak: float, num_steps: int, schedule: ScheduleConfig) -> float:
    """Learning rate of the step numbered `step`, from 0, of a run of `num_steps`.

    A skipped step has a number like any other: the schedule goes by the data that was seen, not by the
    updates that were made. The warm-up reaches the peak at step `warmup_steps`; the first step already
    moves. WSD is the warm-up-stable-decay schedule of MiniCPM (arXiv 2404.06395), with a linear decay.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / (schedule.warmup_steps + 1)
    floor = schedule.min_lr_frac
    if schedule.kind == "constant":
        return peak
    if schedule.kind == "cosine":
        done = _progress(step, start=schedule.warmup_steps, end=num_steps)
        return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))
    decay_start = max(schedule.warmup_steps, round(num_steps * (1 - schedule.decay_frac)))
    return peak * (1 - (1 - floor) * _progress(step, start=decay_start, end=num_steps))


def _progress(step: int, *, start: int, end: int) -> float:
    """Where `step` lies between `start` and `end`, from 0 to 1."""
    if step <= start:
        return 0.0
    return min(1.0, (step - start) / max(1, end - start))
