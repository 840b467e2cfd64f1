"""What made a step non-finite: the rank and micro-batch, the operation, and the samples without which it is
finite."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

from torch import Tensor

from harness.errors import HarnessError
from harness.replay.arms import MOST_REPEATING_S, REPEATS
from harness.replay.probe import Probe
from harness.replay.ranks import MicroBatch
from harness.replay.trace import Operation, Tracer
from harness.stability.checks.attention import AttentionProbe
from harness.training.variations import eager, filled

__all__ = ["Activation", "Blame", "Cause", "find_causes", "find_unwritten"]

MOST_TRACED = 4
"""Bad micro-batches of which the operation is looked for."""
MOST_SHOWN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """The largest value that a module's operations gave."""

    module: str
    operation: str
    largest: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Blame:
    """What a bisection over the samples of a micro-batch came to."""

    samples: tuple[int, ...] = ()
    """Those without which it is finite, by their index in the data set; empty: no samples are to blame."""
    reason: str
    """In words."""
    num_runs: int = 0


@dataclass(kw_only=True)
class Cause:
    """Why one micro-batch is not finite."""

    rank: int
    micro_batch: int
    loss: float
    way: list[Operation | str] = field(default_factory=list)
    """From the producer to what is bad in the end; a text: it was bad before."""
    activations: list[Activation] = field(default_factory=list)
    attention_logits: list[float] = field(default_factory=list)
    """Largest of each call of attention, in order."""
    blame: Blame | None = None
    only_together: bool = False
    """By itself the micro-batch is finite: it is the sum over micro-batches that is not."""

    @property
    def producer(self) -> Operation | str | None:
        """Where it began."""
        return self.way[0] if self.way else None


def find_causes(
    probe: Probe, passes: Sequence[MicroBatch], *, bad_ranks: Sequence[int], earlier: Sequence[MicroBatch]
) -> list[Cause]:
    """Looks into the bad micro-batches of a step that is not finite.

    Args:
        passes: All micro-batches of the step.
        bad_ranks: The ranks whose own loss or gradient is bad.
        earlier: Those of a step before, which was finite.
    """
    outcomes = {id(one): probe.run(one) for one in passes}
    bad = [one for one in passes if outcomes[id(one)].is_bad]
    sound = [one for one in passes if not outcomes[id(one)].is_bad] or [
        one for one in earlier if not probe.run(one).is_bad
    ]
    usual = _usual(probe, sound[:1])
    causes: list[Cause] = []
    for one in bad:
        cause = Cause(rank=one.rank, micro_batch=one.number, loss=outcomes[id(one)].loss)
        if len(causes) < MOST_TRACED:
            _trace(probe, one, cause, usual)
        try:
            cause.blame = find_samples(probe, one, control=sound)
        except (HarnessError, RuntimeError) as error:  # batch normalisation takes no single sample, say
            first = str(error).splitlines()[0]
            cause.blame = Blame(reason=f"its samples cannot be run by themselves: {first}")
        causes.append(cause)
    for rank in bad_ranks:
        if not any(cause.rank == rank for cause in causes):
            causes.append(Cause(rank=rank, micro_batch=-1, loss=0.0, only_together=True))
    return sorted(causes, key=lambda cause: (cause.micro_batch, cause.rank))


def find_unwritten(probe: Probe, passes: Sequence[MicroBatch]) -> list[Cause]:
    """Micro-batches that are finite, and are not where memory that nobody has written holds NaN; each is run
    several times, as an operation may leave something out now and then."""
    causes: list[Cause] = []
    deadline = time.monotonic() + MOST_REPEATING_S
    for one in (one for one in passes for _ in range(REPEATS)):
        if time.monotonic() > deadline or len(causes) == MOST_TRACED:
            break
        if any((cause.rank, cause.micro_batch) == (one.rank, one.number) for cause in causes):
            continue
        outcome = probe.run(one, within=filled)
        if outcome.is_bad and not probe.run(one).is_bad:
            cause = Cause(rank=one.rank, micro_batch=one.number, loss=outcome.loss)
            _trace(probe, one, cause, set(), within=filled)
            causes.append(cause)
    return causes


def find_samples(probe: Probe, micro_batch: MicroBatch, *, control: Sequence[MicroBatch]) -> Blame:
    """Bisects a bad micro-batch: exactly the samples without which it is finite."""
    before, count = probe.num_runs, len(micro_batch.samples)
    found = list(_bad_rows(probe, micro_batch, range(count)))
    rest = [row for row in range(count) if row not in found]

    def blame(reason: str, rows: Sequence[int] = ()) -> Blame:
        samples = tuple(micro_batch.samples[row] for row in rows)
        return Blame(samples=samples, reason=reason, num_runs=probe.num_runs - before)

    if not found:
        return blame(
            "the whole micro-batch is not finite, and each half of it is: no sample is to blame alone"
        )
    if rest and probe.run(micro_batch, rest).is_bad:
        return blame("it is not finite without the samples that are bad by themselves either")
    if not rest:
        others = [one for one in control if one.samples != micro_batch.samples][:1]
        if not others:
            return blame("every sample is bad by itself, and there are no others to compare them with")
        if probe.run(micro_batch, batch=others[0].batch).is_bad:
            return blame("every sample is bad by itself, and so is data that is in order elsewhere")
        return blame("every sample is bad by itself, and other data in their place is finite", found)
    return blame(f"without {'it' if len(found) == 1 else 'them'} the micro-batch is finite", found)


def _bad_rows(probe: Probe, micro_batch: MicroBatch, rows: Sequence[int]) -> Iterator[int]:
    """Those that are bad by themselves; a part that is finite is not looked into any further."""
    if not probe.run(micro_batch, rows).is_bad:
        return
    if len(rows) == 1:
        yield rows[0]
        return
    middle = len(rows) // 2
    yield from _bad_rows(probe, micro_batch, rows[:middle])
    yield from _bad_rows(probe, micro_batch, rows[middle:])


def _usual(probe: Probe, sound: Sequence[MicroBatch]) -> set[tuple[str, str | None, str]]:
    """Operations that leave something non-finite in a micro-batch that is in order."""
    keys: set[tuple[str, str | None, str]] = set()
    for one in sound:
        tracer = _tracer(probe, one)
        probe.run(one, within=functools.partial(_traced, tracer))
        keys.update(operation.key for operation in tracer.operations)
    return keys


def _trace(
    probe: Probe,
    micro_batch: MicroBatch,
    cause: Cause,
    usual: set[tuple[str, str | None, str]],
    *,
    within: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    tracer, attention = _tracer(probe, micro_batch), AttentionProbe()

    def look(losses: list[Tensor]) -> None:
        bad = [one for one in losses if not bool(one.isfinite())] or [
            p.grad for p in probe.ranks.judge.layout.parameters if p.grad is not None and _is_bad(p.grad)
        ]
        cause.way = tracer.way_to(bad, usual=usual)

    @contextmanager
    def traced() -> Iterator[None]:
        with within(), _traced(tracer, attention):
            yield

    probe.run(micro_batch, look=look, within=traced)
    ranked = sorted(tracer.largest.items(), key=lambda item: -item[1][0])
    cause.activations = [
        Activation(module=module, operation=forward.name, largest=largest)
        for module, (largest, forward) in ranked[:MOST_SHOWN]
    ]
    cause.attention_logits = [float(one) for one in attention.maxima]


def _tracer(probe: Probe, micro_batch: MicroBatch) -> Tracer:
    model = probe.ranks.task.model
    known: list[tuple[str, Tensor]] = [(f"parameter {name}", p) for name, p in model.named_parameters()]
    known += [(f"buffer {name}", b) for name, b in model.named_buffers()]
    known += [(f"the batch's {name}", t) for name, t in micro_batch.batch.items() if isinstance(t, Tensor)]
    return Tracer(model, known)


@contextmanager
def _traced(tracer: Tracer, attention: AttentionProbe | None = None) -> Iterator[None]:
    with eager():
        if attention is None:
            with tracer:
                yield
        else:
            with attention, tracer:
                yield


def _is_bad(gradient: Tensor) -> bool:
    return not bool(gradient.isfinite().all())
