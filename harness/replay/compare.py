"""Whether a replay does what the run did, number by number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from harness.records import StepRecord
from harness.replay.history import History
from harness.runlog.names import Metric
from harness.stability.incidents import Incident, SamplesOf

__all__ = ["Difference", "Parting", "Passed", "differences", "parting", "relative"]

ROUNDING = 1e-5
"""Relative difference that the order of summation over ranks, and another kernel, can explain."""
SIZE = 1e-3
"""Relative difference of loss and norm up to which a finite step counts as the same one."""


class Passed(NamedTuple):
    """What is kept of a step on the way: a whole record holds numbers of every parameter."""

    step: int
    loss: float
    grad_norm: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Something about the step that is not as it was."""

    what: str
    in_run: Any
    in_replay: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Parting:
    """How closely the steps on the way followed the log."""

    num_steps: int
    """Steps of which the log has loss and norm."""
    num_same_bits: int
    """Steps at the beginning in which both were the same bits."""
    largest: float
    """Largest relative difference."""
    step: int | None
    """First step that differs by more than rounding; None: none does."""
    first_other: int | None = None
    """First step that is not the same bits."""
    metric: str | None = None
    in_run: float = math.nan
    in_replay: float = math.nan

    @property
    def is_same(self) -> bool:
        """Whether there were such steps, and all of them were the same."""
        return 0 < self.num_steps == self.num_same_bits

    @property
    def is_abrupt(self) -> bool:
        """Whether steps were the same bits up to one that differs by more than rounding."""
        return self.step is not None and self.num_same_bits > 0 and self.first_other == self.step


def parting(history: History, way: Sequence[Passed]) -> Parting:
    """Compares loss and gradient norm of the steps before the one that is replayed with the log."""
    first: tuple[int, str, float, float] | None = None
    other: int | None = None
    num_steps, num_same, largest = 0, 0, 0.0
    for passed in way:
        pairs = list(_pairs(history.values, passed))
        num_steps += bool(pairs)
        for metric, logged, now in pairs:
            difference = relative(logged, now)
            if difference > 0.0 and other is None:
                other = passed.step
            largest = max(largest, difference)
            if difference > ROUNDING and first is None:
                first = passed.step, metric, logged, now
        num_same += other is None and bool(pairs)
    numbers: dict[str, Any] = {
        "num_steps": num_steps,
        "num_same_bits": num_same,
        "largest": largest,
        "first_other": other,
    }
    if first is None:
        return Parting(step=None, **numbers)
    step, metric, logged, now = first
    return Parting(step=step, metric=metric, in_run=logged, in_replay=now, **numbers)


def differences(history: History, record: StepRecord, samples_of: SamplesOf) -> list[Difference]:
    """What the log and the replay say of the step, where they do not say the same."""
    found = list(_incident_differences(history, record, samples_of))
    if not record.skipped and not _is_bad(record):
        for metric, logged, now in _pairs(history.values, record):
            if relative(logged, now) > SIZE:
                found.append(Difference(what=metric, in_run=logged, in_replay=now))
    return found


def _incident_differences(history: History, record: StepRecord, samples_of: SamplesOf) -> Any:
    logged, now = history.incident, Incident.of(record, samples_of=samples_of, outliers=True)
    if logged is None or now is None:
        if logged is not None:
            yield Difference(what="incident", in_run=logged.summary, in_replay=None)
        elif now is not None:
            yield Difference(what="incident", in_run=None, in_replay=now.summary())
        return
    for name in ("verdict", "rank", "parameter", "micro_batch", "num_nan", "num_inf", "is_outlier"):
        before, after = getattr(logged, name), getattr(now, name)
        if before != after:
            yield Difference(what=name, in_run=before, in_replay=after)
    if tuple(logged.sample_indices) != now.sample_indices:
        yield Difference(
            what="samples", in_run=list(logged.sample_indices), in_replay=list(now.sample_indices)
        )
    bad = {name: row.num_nan + row.num_inf for name, row in record.per_parameter.items()}
    bad = {name: count for name, count in bad.items() if count > 0}
    for name in sorted({*bad, *history.bad_elements}):
        before, after = history.bad_elements.get(name, 0), bad.get(name, 0)
        if before != after:
            yield Difference(what=f"NaN and Inf in {name}", in_run=before, in_replay=after)


def _pairs(values: Mapping[str, Mapping[int, float]], record: StepRecord | Passed) -> Any:
    for metric, now in ((Metric.TRAIN_LOSS, record.loss), (Metric.GRAD_NORM, record.grad_norm)):
        logged = values.get(metric, {}).get(record.step)
        if logged is not None:
            yield metric, logged, now


def relative(a: float, b: float) -> float:
    """By how much two values differ, of the larger one; infinite where only one is finite."""
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b))


def _is_bad(record: StepRecord) -> bool:
    return not (math.isfinite(record.loss) and math.isfinite(record.grad_norm))
