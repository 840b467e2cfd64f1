"""Whose fault it is: the same micro-batch again with one thing changed at a time.

What changes with what decides whether the data, the model, a kernel or the hardware is to blame.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from harness.errors import HarnessError
from harness.replay.cause import Cause
from harness.replay.compare import Parting
from harness.replay.probe import Outcome, Probe
from harness.replay.ranks import MicroBatch
from harness.replay.trace import Operation
from harness.replay.variations import deterministic_algorithms, eager, filled, plain_attention

__all__ = ["Arm", "Judgement", "judge_cause", "judge_sound", "run_arms"]

REPEATS = 2
_FAULTS = "harness/training/faults.py"

Kind = Literal["data", "model", "precision", "kernel", "hardware", "state", "rehearsed", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One variation, and what came of it."""

    name: str
    is_bad: bool | None
    """Whether loss or gradient were not finite; None: it could not be run."""
    same: bool
    """Whether loss and gradient statistics are those of the first run, bit for bit."""
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """To whom the evidence points."""

    kind: Kind
    sure: Literal["sure", "likely", "open"]
    why: str


def run_arms(probe: Probe, micro_batch: MicroBatch, *, has_attention: bool) -> list[Arm]:
    """Runs a bad micro-batch again, with one thing changed at a time."""
    first = probe.run(micro_batch)
    arms = [_arm(probe, micro_batch, "the same again", first) for _ in range(REPEATS)]
    arms.append(_arm(probe, micro_batch, "deterministic algorithms", first, deterministic_algorithms))
    arms.append(_arm(probe, micro_batch, "uninitialised memory filled with NaN", first, filled))
    if has_attention:
        arms.append(_arm(probe, micro_batch, "attention by plain matrix products", first, plain_attention))
    if probe.ranks.precision != "fp32":
        arms.append(_arm(probe, micro_batch, "fp32", first, precision="fp32"))
    if probe.ranks.config.loop.compile:
        arms.append(_arm(probe, micro_batch, "not compiled", first, eager))
    return arms


def judge_cause(cause: Cause, arms: Sequence[Arm]) -> Judgement:
    """To whom what is known of a bad micro-batch points; the most telling evidence first."""
    producer = cause.producer
    if isinstance(producer, Operation) and (producer.place.file or "").endswith(_FAULTS):
        return _judged("rehearsed", "sure", "the value was put there by a fault of the configuration")
    by_name = {arm.name: arm for arm in arms}
    again = [arm for arm in arms if arm.name == "the same again"]
    if any(arm.is_bad is False for arm in again):
        return _judged("hardware", "likely", "the same kernels on the same numbers give a finite result too")
    if any(not arm.same for arm in again):
        return _judged("kernel", "likely", "the same kernels on the same numbers do not give the same bits")
    if isinstance(producer, Operation) and producer.is_empty:
        return _judged("kernel", "sure", "what is bad was never written by any operation")
    if isinstance(producer, str) and producer.startswith(("parameter", "buffer")):
        return _judged("state", "sure", f"the {producer} is not finite before the step")
    for name in ("deterministic algorithms", "attention by plain matrix products", "not compiled"):
        if name in by_name and by_name[name].is_bad is False:
            return _judged("kernel", "likely", f"with {name} it is finite")
    blame = cause.blame
    if blame is not None and blame.samples:
        return _judged("data", "sure", f"it is bad with certain samples only: {blame.reason}")
    if "fp32" in by_name and by_name["fp32"].is_bad is False:
        return _judged("precision", "likely", "in fp32 it is finite")
    tried_data = blame is not None and blame.num_runs > 0
    if tried_data and all(arm.is_bad for arm in arms if arm.is_bad is not None):
        return _judged("model", "likely", "it is bad with all data and in every variation")
    return _judged("unknown", "open", "neither data nor variations tell")


def judge_sound(causes: Sequence[Cause], *, way: Parting, notes: Sequence[str]) -> Judgement:
    """To whom it points that a step which was not finite in the run is finite in the replay.

    Args:
        causes: What is bad where memory that nobody has written holds NaN.
        way: How closely the steps before followed the log.
        notes: What is not as it was in the run.
    """
    unwritten = [
        cause.producer
        for cause in causes
        if isinstance(cause.producer, Operation) and cause.producer.is_empty
    ]
    if unwritten:
        return _judged("kernel", "likely", "memory that nobody has written is used, and may hold anything")
    if not way.num_steps:
        why = "no step before it was compared with the log; --steps-before compares some"
        return _judged("unknown", "open", why)
    if not way.is_same:
        return _judged("unknown", "open", "the replay comes to the step with other weights than the run")
    if notes:
        return _judged("unknown", "open", f"not all is as it was in the run: {'; '.join(notes)}")
    why = (
        "losses and norms of the steps before are the same, and the step is finite; callbacks that were given"
        " to train() in Python are not in the log, and may have changed it"
    )
    return _judged("hardware", "likely", why)


def _judged(kind: Kind, sure: Literal["sure", "likely", "open"], why: str) -> Judgement:
    return Judgement(kind=kind, sure=sure, why=why)


def _arm(
    probe: Probe,
    micro_batch: MicroBatch,
    name: str,
    first: Outcome,
    within: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    precision: str | None = None,
) -> Arm:
    try:
        outcome = probe.run(micro_batch, within=within, precision=precision)
    except (HarnessError, RuntimeError) as error:
        return Arm(name=name, is_bad=None, same=False, problem=str(error).splitlines()[0])
    same = outcome.same_as(first)
    return Arm(name=name, is_bad=outcome.is_bad, same=same)
