"""Whose fault it is: what the log, the replay and its arms say together."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from harness.replay.arms import AGAIN, COMPILED, DETERMINISTIC, FILLED, PLAIN, PRECISE, Arm
from harness.replay.cause import Cause
from harness.replay.compare import Parting
from harness.replay.spike import Carriers
from harness.replay.trace import Operation

__all__ = [
    "Judgement",
    "has_diverged",
    "judge_cause",
    "judge_sound",
    "judge_spike",
    "judge_sum",
    "judge_update",
]

GREW = 10.0
"""Times its lowest value so far that a loss or a norm is at, when training has diverged."""
NUM_GROWN = 2
"""Steps in a row at which it is, the incident's and the one before: a single one may be a batch's."""
_FAULTS = "harness/training/faults.py"

Kind = Literal[
    "data", "model", "optimization", "precision", "kernel", "hardware", "state", "rehearsed", "unknown"
]
Sure = Literal["sure", "likely", "open"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """To whom the evidence points."""

    kind: Kind
    sure: Sure
    why: str


def judge_cause(cause: Cause, arms: Sequence[Arm], *, diverged: str = "") -> Judgement:
    """To whom what is known of a bad micro-batch points; the most telling evidence first.

    Args:
        diverged: How losses or norms grew over the steps before, in words; empty: they did not.
    """
    producer = cause.producer
    if isinstance(producer, Operation) and (producer.place.file or "").endswith(_FAULTS):
        return _judged("rehearsed", "sure", "the value was put there by a fault of the configuration")
    if isinstance(producer, Operation) and producer.is_empty:
        return _judged("kernel", "sure", "what is bad was never written by any operation")
    by_name = {arm.name: arm for arm in arms}
    unsteady = _unsteady(by_name)
    if unsteady:
        return _judged("kernel", "likely", unsteady)
    if isinstance(producer, str) and producer.startswith(("parameter", "buffer")):
        return _judged("state", "sure", f"the {producer} is not finite before the step")
    for name in (DETERMINISTIC, PLAIN, COMPILED):
        if name in by_name and by_name[name].is_bad is False:
            return _judged("kernel", "likely", f"with {name} it is finite")
    if diverged:
        return _judged("optimization", "likely", diverged)
    blame = cause.blame
    if blame is not None and blame.samples:
        return _judged("data", "sure", f"it is bad with certain samples only: {blame.reason}")
    if PRECISE in by_name and by_name[PRECISE].is_bad is False:
        return _judged("precision", "likely", "in fp32 it is finite")
    tried_data = blame is not None and blame.num_runs > 0
    if tried_data and all(arm.is_bad for arm in arms if arm.is_bad is not None):
        return _judged("model", "likely", "it is bad with all data and in every variation")
    return _judged("unknown", "open", "neither data nor variations tell")


def judge_sound(
    causes: Sequence[Cause], *, way: Parting, notes: Sequence[str], arms: Sequence[Arm] = ()
) -> Judgement:
    """To whom it points that a step which was an incident in the run is in order in the replay.

    Args:
        causes: What is bad where memory that nobody has written holds NaN.
        way: How closely the steps before followed the log.
        notes: What is not as it was in the run.
        arms: Of the micro-batch that was to blame in the run.
    """
    unsteady = _unsteady({arm.name: arm for arm in arms})
    unwritten = [one for one in causes if isinstance(one.producer, Operation) and one.producer.is_empty]
    if unsteady and not unwritten:
        return _judged("kernel", "likely", unsteady)
    if causes:
        return _judged("kernel", "likely", "memory that nobody has written is used, and may hold anything")
    if not way.num_steps:
        why = "no step before it was compared with the log; --steps-before compares some"
        return _judged("unknown", "open", why)
    if not way.is_same and not way.is_abrupt:
        return _judged("unknown", "open", "the replay comes to the step with other weights than the run")
    if notes:
        return _judged("unknown", "open", f"not all is as it was in the run: {'; '.join(notes)}")
    same = "losses and norms of the steps before are the same, and the step is in order"
    if not way.is_same:
        same = (
            f"losses and norms are the same bits up to step {way.step}, where the run goes another way; here"
            " the same numbers give the same bits each time"
        )
    why = (
        f"{same}; callbacks that were given to train() in Python are not in the log, and may have changed it"
    )
    return _judged("hardware", "likely", why)


def judge_sum(causes: Sequence[Cause], arms: Sequence[Arm], *, reproduced: bool) -> Judgement:
    """To whom it points that a step is bad, and none of its micro-batches is when it is run by itself."""
    unsteady = _unsteady({arm.name: arm for arm in arms})
    if causes and not unsteady:
        return _judged("kernel", "likely", "memory that nobody has written is used, and may hold anything")
    if unsteady or not reproduced:
        why = unsteady or "the same kernels on the same numbers were not finite here once, and are finite now"
        return _judged("kernel", "likely", why)
    return _judged("precision", "likely", "only the sum over the micro-batches is not finite")


def judge_update() -> Judgement:
    """To whom it points that the update of a finite gradient is taken back in the replay too."""
    why = "the gradients are finite, and what the optimizer makes of them is not"
    return _judged("optimization", "likely", why)


def judge_spike(carriers: Carriers, arms: Sequence[Arm], *, diverged: str = "") -> Judgement:
    """To whom a finite step points that is as large in the replay as it was in the run."""
    by_name = {arm.name: arm for arm in arms}
    unsteady = _unsteady(by_name)
    if unsteady:
        return _judged("kernel", "likely", unsteady)
    if FILLED in by_name and by_name[FILLED].is_bad:
        return _judged("kernel", "likely", "memory that nobody has written is used, and may hold anything")
    if diverged:
        return _judged("optimization", "likely", diverged)
    outstanding = carriers.outstanding
    if outstanding:
        names = ", ".join(str(one.sample) for one in outstanding)
        return _judged("data", "likely", f"certain samples carry it: {names}")
    why = "every sample carries it, with the same bits each time: the weights are where it comes from"
    return _judged("optimization", "likely", why)


def has_diverged(values: Sequence[tuple[str, Sequence[float]]]) -> str:
    """How training had left its course before an incident, in words; empty: it had not.

    Args:
        values: Metrics by name, in the order of the steps: the finite values before, and the incident's own.
    """
    for name, series in values:
        before, last = series[:-NUM_GROWN], series[-NUM_GROWN:]
        if before and min(last) > GREW * _usual(before) > 0.0:
            return (
                f"{name} had left its course before: {last[0]:.3g} at the step before, and"
                f" {_usual(before):.3g} at its best; the learning rate, or what the optimizer made of it"
            )
    return ""


def _usual(values: Sequence[float]) -> float:
    """The lowest of what is steady: single small values are chance."""
    if len(values) < 3:
        return min(values)
    return min(statistics.median(values[i : i + 3]) for i in range(len(values) - 2))


def _unsteady(arms: dict[str, Arm]) -> str:
    """How the same kernels on the same numbers do not give the same, in words; empty: they do."""
    again, fixed = arms.get(AGAIN), arms.get(DETERMINISTIC)
    if again is None:
        return ""
    if again.is_mixed:
        return (
            f"the same kernels on the same numbers are not finite in {again.num_bad} of {again.num_runs}"
            " runs: one of them races, or does not write all of its output"
        )
    # Kernels of torch that add in any order are not to blame: they have others, which do not.
    if not again.is_repeatable and (fixed is None or not fixed.is_repeatable):
        return "the same kernels on the same numbers do not give the same bits: one of them races"
    return ""


def _judged(kind: Kind, sure: Sure, why: str) -> Judgement:
    return Judgement(kind=kind, sure=sure, why=why)
