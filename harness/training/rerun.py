"""A micro-batch of an incident again, on the spot: the first variations of a replay, while the machine is in
the state in which it happened."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch

from harness.checkpoint import Rng
from harness.config import TrainConfig
from harness.data import Batch
from harness.dist import local_part, plain
from harness.records import StepRecord
from harness.stability.checks.fingerprint import sum_of_bits
from harness.training.black_box import BlackBox
from harness.training.callbacks import Callback, Training
from harness.training.incident_writer import HeldStep
from harness.training.recompute import aside
from harness.training.step import StepRunner
from harness.training.variations import deterministic_algorithms, eager, filled, plain_attention

__all__ = ["RerunArm", "Rerunner", "what_it_says"]

logger = logging.getLogger(__name__)

AGAIN, FILLED, PRECISE = "the same again", "uninitialised memory filled with NaN", "fp32"
REPEATS = 2
MOST_S = 30.0
"""Of the slowest rank, by the time that it has said its steps take; fewer variations are run where it is less
than all of them need."""
_MOST_IN_WINDOW = 4
_WINDOW_STEPS = 100

Within = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RerunArm:
    """One pass over the micro-batch."""

    name: str
    loss: float
    """Of one token, on average."""
    is_bad: bool
    bits: int
    """Checksum of loss and gradients."""
    problem: str = ""

    def __str__(self) -> str:
        if self.problem:
            return f"{self.name}: could not be run: {self.problem}"
        return f"{self.name}: {'not finite' if self.is_bad else f'finite, loss {self.loss:.6g}'}"


class Rerunner(Callback):
    """Runs the culprit's micro-batch of an incident again, as `incidents.rerun` asks for.

    Every rank runs its own micro-batch of that number, at the same step: whether and how often follows from
    the record, which is equal on all ranks, and nothing is reduced. What is left are lines in `rank-R.json`.
    The verdict of a step comes `guard.lag_steps` steps later, so the weights may not be the same any more.
    """

    def __init__(self, config: TrainConfig, runner: StepRunner, black_box: BlackBox) -> None:
        super().__init__(config)
        self._runner, self._black_box = runner, black_box
        self._done: deque[int] = deque(maxlen=_MOST_IN_WINDOW)
        self._variations = _variations(config, runner.precision)

    def on_step(self, run: Training, record: StepRecord) -> None:
        if record.reason is None or record.micro_batch is None or not self._may_run(record):
            return
        held = self._black_box.held(record.step)
        if held is None or not held.batches:
            return
        self._done.append(record.step)
        batch = held.batches[min(record.micro_batch, len(held.batches) - 1)]
        arms = [
            self._arm(record.step, held, batch, *variation)
            for variation in self._variations[: self._num_runs(record)]
        ]
        steps_later = run.counters.step - record.step - 1
        says = what_it_says(arms, steps_later=steps_later, was_bad=_was_bad(record))
        held.rerun = (says, *map(str, arms))
        if record.rank == run.world.rank:
            logger.warning("step %d again, on rank %d: %s", record.step, run.world.rank, says)

    def _may_run(self, record: StepRecord) -> bool:
        recent = [step for step in self._done if abs(record.step - step) < _WINDOW_STEPS]
        return len(recent) < _MOST_IN_WINDOW and self._num_runs(record) > 0

    def _num_runs(self, record: StepRecord) -> int:
        slowest_s = max(row.compute_s for row in record.per_rank)
        return len(self._variations) if slowest_s <= 0 else int(MOST_S / slowest_s)

    def _arm(
        self, step: int, held: HeldStep, batch: Batch, name: str, within: Within, precision: str | None
    ) -> RerunArm:
        runner = self._runner if precision is None else replace(self._runner, precision=precision)
        model = plain(runner.model)
        try:
            with aside(model), within():
                Rng().load_state_dict(held.rng.state_dict())
                loss = runner.locally(step, batch)
                gradients = [local_part(p.grad) for p in model.parameters() if p.grad is not None]
                bad = [loss.total.detach().isfinite().all(), *(one.isfinite().all() for one in gradients)]
                bits = torch.stack([sum_of_bits(one) for one in (loss.total.detach(), *gradients)])
                per_token = float(loss.total.detach()) / max(float(loss.count), 1.0)
                return RerunArm(
                    name=name,
                    loss=per_token,
                    is_bad=not bool(torch.stack(bad).all()),
                    bits=hash(tuple(bits.tolist())),
                )
        except RuntimeError as error:  # a kernel that has no deterministic form, say
            first = str(error).splitlines()[0]
            return RerunArm(name=name, loss=math.nan, is_bad=False, bits=0, problem=first)


def what_it_says(arms: list[RerunArm], *, steps_later: int, was_bad: bool) -> str:
    """What follows from the variations, as far as it does with weights that may be of `steps_later` steps
    later; `was_bad`: loss or gradient were not finite in the step itself."""
    ran = [arm for arm in arms if not arm.problem]
    again = [arm for arm in ran if arm.name == AGAIN]
    weights = "the same weights" if steps_later == 0 else f"weights of up to {steps_later} steps later"
    if not again:
        return "it could not be run again"
    if len({arm.is_bad for arm in again}) > 1 or (
        len({arm.bits for arm in again}) > 1 and not any(arm.is_bad for arm in again)
    ):
        return (
            "the same kernels on the same numbers do not give the same bits: a kernel that races, or hardware"
        )
    others = [arm.name for arm in ran if arm.is_bad != again[0].is_bad]
    if not again[0].is_bad:
        if FILLED in others:
            return "it is not finite where memory that nobody has written holds NaN: a kernel"
        if was_bad and steps_later == 0:
            return "on the same weights it is finite now: hardware, or a kernel that fails now and then"
        return f"with {weights} it is finite" + (", which leaves it open" if was_bad else "")
    if others:
        kind = "the precision" if others == [PRECISE] else "a kernel"
        return f"with {weights} it is not finite again, but finite with {' and '.join(others)}: {kind}"
    return f"with {weights} it is not finite again, in every variation: data or model, and no glitch"


def _variations(config: TrainConfig, precision: str) -> list[tuple[str, Within, str | None]]:
    """The most telling first."""
    found: list[tuple[str, Within, str | None]] = [(AGAIN, nullcontext, None)] * REPEATS
    found.append((FILLED, filled, None))
    found.append(("deterministic algorithms", deterministic_algorithms, None))
    if config.loop.compile:
        found.append(("not compiled", eager, None))
    if precision != "fp32":
        found.append((PRECISE, nullcontext, "fp32"))
    found.append(("attention by plain matrix products", plain_attention, None))
    return found


def _was_bad(record: StepRecord) -> bool:
    return bool(record.num_nan or record.num_inf) or not math.isfinite(record.loss)
