"""Reads TensorBoard's event files back with TensorBoard's own reader."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

__all__ = ["shown_scalars"]


def shown_scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    """Step and value of each point that TensorBoard shows of a tag."""
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]
