"""The learning rate as a function of the step and of recorded settings: there is no state to restore."""

from __future__ import annotations

import math

from harness.config import ScheduleConfig, TrainConfig

__all__ = ["describe_schedule", "learning_rate"]


def learning_rate(step: int, *, peak: float, num_steps: int, schedule: ScheduleConfig) -> float:
    """Learning rate of the step numbered `step`, from 0.

    A skipped step has a number like any other: the schedule goes by the data that was seen, not by the
    updates that were made. The warm-up reaches the peak at step `warmup_steps`; the first step already
    moves. WSD is the warm-up-stable-decay schedule of MiniCPM (arXiv 2404.06395), with a linear decay.

    Args:
        num_steps: Length of the schedule, which need not be the run's: later steps take the rate that it ends
            with. Under `constant` it means nothing.
    """
    if schedule.kind != "constant":
        step = min(step, num_steps)
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


def describe_schedule(config: TrainConfig, *, step: int, length: int, length_before: int) -> str:
    """What the steps from `step` on take, in a line.

    Args:
        length: Of the schedule, in steps.
        length_before: The same in the attempt before; equal to `length` if there was none.
    """
    schedule, num_steps = config.schedule, config.loop.steps
    if schedule.kind == "constant":
        return (
            f"learning rate: constant at {config.optim.lr:.3g} after {schedule.warmup_steps} steps of warm-up"
        )

    def rate(at: int, length: int) -> str:
        return f"{learning_rate(at, peak=config.optim.lr, num_steps=length, schedule=schedule):.3g}"

    line = f"learning rate: {schedule.kind} over {length} steps, {rate(step, length)} at step {step}"
    if length_before != length:
        line += f", where --schedule.steps {length_before} gave {rate(step, length_before)}"
    if num_steps > length:
        line += f"; it stays at {rate(length, length)} from step {length} on"
        line += f" (--schedule.steps {num_steps} makes it {rate(step, num_steps)} at step {step})"
    elif num_steps < length:
        line += f", {rate(num_steps - 1, length)} in the last, {num_steps - 1}"
    return line


def _progress(step: int, *, start: int, end: int) -> float:
    """Where `step` lies between `start` and `end`, from 0 to 1."""
    if step <= start:
        return 0.0
    return min(1.0, (step - start) / max(1, end - start))
