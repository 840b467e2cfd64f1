"""A micro-batch again with one thing changed at a time: what changes with what says whose fault it is."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

from harness.errors import HarnessError
from harness.replay.probe import Outcome, Probe
from harness.replay.ranks import MicroBatch
from harness.training.variations import deterministic_algorithms, eager, filled, plain_attention

__all__ = ["AGAIN", "COMPILED", "DETERMINISTIC", "FILLED", "PLAIN", "PRECISE", "Arm", "run_arms"]

AGAIN = "the same again"
DETERMINISTIC = "deterministic algorithms"
FILLED = "uninitialised memory filled with NaN"
PLAIN = "attention by plain matrix products"
PRECISE = "fp32"
COMPILED = "not compiled"

REPEATS = 16
"""Runs of what may be at fault now and then: one of five times is missed in 3 of 100 replays."""
MOST_REPEATING_S = 20.0
"""Of one arm; an arm has one run at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One variation, and what came of its runs."""

    name: str
    is_bad: bool | None
    """Whether loss or gradient were not finite, in any of its runs; None: it could not be run."""
    same: bool
    """Whether loss and gradient statistics are those of the first run, bit for bit, in all of them."""
    num_runs: int = 1
    num_bad: int = 0
    is_repeatable: bool = True
    """Whether its runs gave the same bits as one another."""
    problem: str = ""

    @property
    def is_mixed(self) -> bool:
        """Whether some of its runs were finite and others not."""
        return 0 < self.num_bad < self.num_runs


def run_arms(probe: Probe, micro_batch: MicroBatch, *, has_attention: bool) -> list[Arm]:
    """Runs a micro-batch again, with one thing changed at a time; sound ones may be bad now and then."""
    first = probe.run(micro_batch)

    def arm(
        name: str,
        within: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
        *,
        runs: int = 1,
        precision: str | None = None,
    ) -> Arm:
        return _arm(name, first, lambda: probe.run(micro_batch, within=within, precision=precision), runs)

    arms = [arm(AGAIN, runs=REPEATS), arm(DETERMINISTIC, deterministic_algorithms, runs=REPEATS // 4)]
    arms.append(arm(FILLED, filled, runs=1 if first.is_bad else REPEATS))
    if has_attention:
        arms.append(arm(PLAIN, plain_attention))
    if probe.ranks.precision != "fp32":
        arms.append(arm(PRECISE, precision="fp32"))
    if probe.ranks.config.loop.compile:
        arms.append(arm(COMPILED, eager))
    return arms


def _arm(name: str, first: Outcome, run: Callable[[], Outcome], num_runs: int) -> Arm:
    outcomes: list[Outcome] = []
    deadline = time.monotonic() + MOST_REPEATING_S
    try:
        while len(outcomes) < num_runs and (not outcomes or time.monotonic() < deadline):
            outcomes.append(run())
    except (HarnessError, RuntimeError) as error:
        return Arm(name=name, is_bad=None, same=False, problem=str(error).splitlines()[0])
    num_bad = sum(one.is_bad for one in outcomes)
    return Arm(
        name=name,
        is_bad=num_bad > 0,
        same=all(one.same_as(first) for one in outcomes),
        num_runs=len(outcomes),
        num_bad=num_bad,
        is_repeatable=all(one.same_as(outcomes[0]) for one in outcomes),
    )
