"""From what people hand over to numbers under the names that log, mirrors and pictures use."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any

from harness.errors import TrackingError
from harness.runlog.names import Metric, Prefix
from harness.runlog.soundness import checked_step
from harness.tracking.boundary import words_of
from harness.tracking.experiment import METRIC_NAMES
from harness.tracking.lenient import flattened, named_values, text_of

__all__ = ["Refused", "numbers_of", "step_numbers", "whole_step"]

Refused = dict[str, str]
"""Names of the values that are no numbers, and why."""
_COUNTED = {"nan_count": 0, "inf_count": 0, "clipping_applied": False}
"""What a step has unless it says otherwise."""


def step_numbers(metrics: Any, values: Mapping[str, Any]) -> tuple[dict[str, float], Refused]:
    """One training step's numbers; the fields of `TrainingMetrics` get their usual names, others `train/`.

    Args:
        metrics: Names and values in one object; what has no names is the loss.
        values: More of them, by name.
    """
    try:
        named = named_values(metrics)
    except TrackingError:
        named = {"loss": metrics}
    given, refused = numbers_of({**_COUNTED, **named, **values})
    numbers = {_logged_name(name): number for name, number in given.items()}
    if numbers.get(Metric.STEP_S) == 0:
        del numbers[Metric.STEP_S]
    return {**numbers, **_clipped(numbers)}, refused


def numbers_of(metrics: Any) -> tuple[dict[str, float], Refused]:
    """Numbers of any kind as Python's, those of nested mappings under names like `val/loss`. None is left
    out. A tensor on a device is waited for.

    Raises:
        TrackingError: `metrics` has no names.
    """
    numbers: dict[str, float] = {}
    refused: Refused = {}
    for name, value in flattened(named_values(metrics)):
        if type(value) is float or (type(value) is int and -(2**63) <= value < 2**63):  # nearly always
            numbers[name] = value
        elif value is not None:
            try:
                numbers[name] = _number(value)
            except Exception as error:  # noqa: BLE001  (a tensor may refuse to be read in any way)
                refused[name] = words_of(error)
    return numbers, refused


def whole_step(step: Any) -> int:
    """A step's number: a whole one of any type.

    Raises:
        TrackingError: it is none, negative, or has more than 63 bits.
    """
    try:
        return checked_step(operator.index(step))
    except TypeError:
        number = _number(step)
        return checked_step(int(number) if number == number // 1 else text_of(step))


def _logged_name(name: str) -> str:
    return METRIC_NAMES.get(name) or (name if "/" in name else f"{Prefix.TRAIN}{name}")


def _clipped(numbers: Mapping[str, float]) -> dict[str, float]:
    """The gradient norm after clipping, where it and the threshold are known."""
    norm, threshold = numbers.get(Metric.GRAD_NORM), numbers.get(Metric.CLIP_THRESHOLD)
    if norm is None or threshold is None:
        return {}
    return {Metric.GRAD_NORM_CLIPPED: threshold if norm > threshold else norm}


def _number(value: Any) -> float:
    """One number: Python's or numpy's, or the only element of a tensor or an array."""
    if any(not placement.is_replicate() for placement in getattr(value, "placements", ())):
        raise TrackingError(
            "it is a DTensor of which every rank holds a part",
            rule="a metric is one number",
            remedy="log value.full_tensor(), taken on all ranks",
        )
    if not isinstance(value, (bool, int, float, Decimal, Fraction)):
        value = _only_element(value)
    if isinstance(value, bool) or (isinstance(value, int) and -(2**63) <= value < 2**63):
        return value
    if isinstance(value, (int, float, Decimal, Fraction)):
        return float(value)
    raise _no_number(value)


def _only_element(value: Any) -> Any:
    size = value.numel() if callable(getattr(value, "numel", None)) else getattr(value, "size", None)
    if isinstance(value, type) or size != 1 or not callable(getattr(value, "item", None)):
        raise _no_number(value)
    element = value.item()
    return float(element) if type(element) is type(value) else element  # numpy's long double stays one


def _no_number(value: Any) -> TrackingError:
    return TrackingError(
        f"it is {text_of(value)[:60]!r} of type {type(value).__name__}",
        rule="a metric is one number",
        remedy="use log_text, log_images or log_gradients for other things",
    )
