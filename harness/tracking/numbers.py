"""From what people hand over to numbers under the names that log, mirrors and pictures use."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from harness.errors import TrackingError
from harness.tracking.codec import to_plain
from harness.tracking.experiment import TrainingMetrics

__all__ = ["numbers_of", "step_numbers"]


def step_numbers(
    metrics: TrainingMetrics | Mapping[str, Any] | None, values: Mapping[str, Any]
) -> dict[str, float]:
    """One training step's numbers; the fields of `TrainingMetrics` get their usual names, others `train/`.

    Raises:
        TrackingError: a value is no number.
    """
    numbers = numbers_of(_training_values(metrics, values))
    return {**numbers, **_clipped(numbers)}


def _training_values(
    metrics: TrainingMetrics | Mapping[str, Any] | None, values: Mapping[str, Any]
) -> dict[str, Any]:
    if isinstance(metrics, TrainingMetrics):
        metrics = {field.name: getattr(metrics, field.name) for field in dataclasses.fields(metrics)}
    given = {**(metrics or {}), **values}
    usual = {field.name for field in dataclasses.fields(TrainingMetrics)}
    own = {name: value for name, value in given.items() if name not in usual}
    named = TrainingMetrics(**{name: value for name, value in given.items() if name in usual}).values()
    if "loss" not in given:
        del named["train/loss"]
    return {**named, **{name if "/" in name else f"train/{name}": value for name, value in own.items()}}


def _clipped(numbers: Mapping[str, float]) -> dict[str, float]:
    """The gradient norm after clipping, where it and the threshold are known."""
    norm, threshold = numbers.get("train/grad_norm"), numbers.get("train/clip_threshold")
    if norm is None or threshold is None:
        return {}
    return {"train/grad_norm_clipped": threshold if norm > threshold else norm}


def numbers_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of any kind as Python's; None is left out.

    Raises:
        TrackingError: a value is no number.
    """
    numbers = {str(name): _number(str(name), value) for name, value in metrics.items()}
    return {name: number for name, number in numbers.items() if number is not None}


def _number(name: str, value: Any) -> float | None:
    if type(value) is float or type(value) is int or value is None:
        return value
    plain, nonfinite = to_plain({name: value})
    [number] = plain.values()
    if nonfinite and len(nonfinite[0]) == 2:  # the value itself, and not something inside it
        return float(nonfinite[0][0])
    if not isinstance(number, float | int):
        raise TrackingError(
            f"the metric {name[:100]!r} is {str(value)[:60]!r}",
            rule="a metric is one number",
            remedy="use log_text, log_images or log_gradients for other things",
        )
    return number
