"""A micro-batch of an incident again, on the spot: the first variations of a replay, while the machine is in
the state in which it happened."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from harness.checkpoint import Rng
from harness.config import TrainConfig
from harness.data import Batch
from harness.dist import local_part, plain
from harness.errors import LostRankError
from harness.records import StepRecord
from harness.stability.checks.fingerprint import sum_of_bits
from harness.training.black_box import BlackBox
from harness.training.callbacks import Callback, Training
from harness.training.counters import incident_kind
from harness.training.incident_writer import HeldStep
from harness.training.progress import Phase
from harness.training.recompute import aside
from harness.training.step import StepRunner
from harness.training.variations import deterministic_algorithms, eager, filled, plain_attention

__all__ = ["RerunArm", "Rerunner", "what_it_says"]

logger = logging.getLogger(__name__)

AGAIN, FILLED, PRECISE = "the same again", "uninitialised memory filled with NaN", "fp32"
NOT_COMPILED = "not compiled"
REPEATS = 2
MOST_S = 30.0
"""Of the slowest rank, if each variation took what it has said that the step took: so many are run. No bound,
for attention without a fused kernel, and fp32, may take several times as long; the number has to be equal on
all ranks."""
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
    moves_buffers: bool = False
    """The pass leaves other buffers than it found."""
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
    Overflows of fp16's loss scale, which are no fault, are left out.
    """

    def __init__(self, config: TrainConfig, runner: StepRunner, black_box: BlackBox) -> None:
        super().__init__(config)
        self._runner, self._black_box = runner, black_box
        self._done: deque[int] = deque(maxlen=_MOST_IN_WINDOW)
        self._variations = _variations(config, runner.precision)

    def on_step(self, run: Training, record: StepRecord) -> None:
        if record.reason is None or record.micro_batch is None or incident_kind(record) == "fp16 overflow":
            return
        if not self._may_run(record):
            return
        held = self._black_box.held(record.step)
        if held is None or not held.batches:
            return
        self._done.append(record.step)
        number = min(record.micro_batch, len(held.batches) - 1)
        arms = []
        for variation in self._variations[: self._num_runs(record)]:
            self._runner.progress.enter(Phase.RECORDS, record.step)
            arms.append(self._arm(record.step, held, held.batches[number], *variation))
        self._runner.progress.enter(Phase.RECORDS, record.step)
        says = what_it_says(
            arms,
            steps_later=_num_updates_since(record, run.counters.step),
            was_bad=_was_bad(record, run.world.rank, number),
            # The generators are those of the step's begin, where blank passes come first. Buffers of a step
            # that was skipped are those that it found, but on ranks that were handed those of rank 0.
            is_same_pass=number == 0
            and self._runner.num_passes == len(held.batches)
            and not (run.world.rank and arms[0].moves_buffers),
        )
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
            with aside(model) as found, within():
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
                    moves_buffers=found.have_changed(),
                )
        except (LostRankError, dist.DistError):
            raise
        except Exception as error:  # noqa: BLE001  (a kernel without a deterministic form, no memory, a user's own)
            first = (str(error).splitlines() or [type(error).__name__])[0]
            return RerunArm(name=name, loss=math.nan, is_bad=False, bits=0, problem=first)


def what_it_says(arms: list[RerunArm], *, steps_later: int, was_bad: bool, is_same_pass: bool) -> str:
    """What follows from the variations.

    Args:
        steps_later: By so many updates the weights may be of later.
        was_bad: This micro-batch of this rank left a loss or gradient that was not finite in the step itself.
        is_same_pass: Random numbers and buffers are those of the step's own pass.
    """
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
        if was_bad and is_same_pass and steps_later == 0:
            return "on the same weights it is finite now: hardware, or a kernel that fails now and then"
        return f"with {weights} it is finite" + (", which leaves it open" if was_bad else "")
    if NOT_COMPILED in others:
        others = [NOT_COMPILED]  # as are those that come after it
    if others:
        kind = "the precision" if others == [PRECISE] else "a kernel"
        return f"with {weights} it is not finite again, but finite with {' and '.join(others)}: {kind}"
    return f"with {weights} it is not finite again, in every variation: data or model, and no glitch"


def _variations(config: TrainConfig, precision: str) -> list[tuple[str, Within, str | None]]:
    """The most telling first. Of a compiled model all but the first are run as it was written: each would be
    compiled anew otherwise, for minutes."""
    again: list[tuple[str, Within, str | None]] = [(AGAIN, nullcontext, None)] * REPEATS
    changed: list[tuple[str, Within, str | None]] = [(FILLED, filled, None)]
    changed.append(("deterministic algorithms", deterministic_algorithms, None))
    if precision != "fp32":
        changed.append((PRECISE, nullcontext, "fp32"))
    changed.append(("attention by plain matrix products", plain_attention, None))
    if not config.loop.compile:
        return [*again, *changed]
    as_written = [(name, _eager(within), wanted) for name, within, wanted in changed]
    return [*again, (NOT_COMPILED, eager, None), *as_written]


def _eager(within: Within) -> Within:
    @contextmanager
    def both() -> Iterator[None]:
        with eager(), within():
            yield

    return both


def _was_bad(record: StepRecord, rank: int, micro_batch: int) -> bool:
    """Whether it was this micro-batch of this rank, and no sum or other one, that was not finite first."""
    row = record.per_rank[rank]
    is_finite = not (row.num_nan or row.num_inf) and math.isfinite(row.loss)
    return not is_finite and (rank, micro_batch) in [(one.rank, one.micro_batch) for one in record.culprits]


def _num_updates_since(record: StepRecord, step: int) -> int:
    """By how many updates the weights may be later than those of the record's step, before `step`."""
    return step - record.step - record.skipped
