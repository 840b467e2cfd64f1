"""What went wrong, as one value per step, and in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from harness.records import Culprit, StepRecord, Verdict

__all__ = ["Incident", "SamplesOf", "report"]

SamplesOf = Callable[[int | None, int | None], Sequence[int]]
"""Indices in the data set of the samples of a step: of this rank's micro-batch of this number (None: of all
that the rank had, where the loop does not tell the guard of micro-batches), or, without a rank, of the whole
global batch."""

SHOWN = 8
"""Samples, and ranks, that a summary lists."""
NAMED = 2
"""Samples of which it says where they come from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """A step that was skipped or that a rule warned of; or, if asked for, an outlier batch, which is none."""

    step: int
    verdict: Verdict
    reason: str
    done: str
    """What became of the step, in words: `skipped`, `clipped to 1 as every step is`."""
    rank: int | None
    """The culprit, where there is one."""
    parameter: str | None
    micro_batch: int | None
    num_nan: int
    num_inf: int
    bad_parameters: tuple[str, ...] = ()
    """All parameters with a NaN or an Inf in any rank's own gradient, in the order of the forward pass."""
    culprits: tuple[Culprit, ...] = ()
    """All ranks that went wrong, each with its micro-batch and that one's samples; `rank` is the first."""
    sample_indices: tuple[int, ...] = ()
    """Samples to look at, by their index in the data set: those of the culprits, or of the whole global batch
    if no rank is to blame for a step that was skipped or a spike."""
    sample_sources: tuple[str, ...] = ()
    """Where the first of these samples come from, if the data set says."""
    is_outlier: bool = False
    """The step is an outlier batch and no incident."""

    @classmethod
    def of(
        cls,
        record: StepRecord,
        *,
        samples_of: SamplesOf | None = None,
        source_of: Callable[[int], str | None] | None = None,
        outliers: bool = False,
    ) -> Incident | None:
        """The incident that `record` tells of, or with `outliers` the outlier batch; None: there is none."""
        reason = record.reason or (record.note if outliers else None)
        if reason is None:
            return None
        culprits, samples = _located(record, samples_of)
        named = [] if source_of is None else [source_of(sample) for sample in samples[:SHOWN]]
        bad = [name for name, row in record.per_parameter.items() if row.num_nan or row.num_inf]
        return cls(
            step=record.step,
            verdict=record.verdict,
            reason=reason,
            done=_done(record),
            is_outlier=record.reason is None,
            rank=record.rank,
            parameter=record.parameter,
            micro_batch=record.micro_batch,
            num_nan=record.num_nan,
            num_inf=record.num_inf,
            bad_parameters=tuple(bad),
            culprits=culprits,
            sample_indices=samples,
            sample_sources=tuple(name for name in named if name is not None) if None not in named else (),
        )

    @property
    def module(self) -> str | None:
        """Name of the module that holds the parameter; empty for the model itself."""
        return None if self.parameter is None else self.parameter.rpartition(".")[0]

    def summary(self) -> str:
        """One line: `step 12 skipped: the loss is nan on rank 1 (micro-batch 2, head.weight)`; of a step that
        was not left out `step 12: spike: loss 8.2, 4.1 times its usual 2 (score 14.0); applied (...)`."""
        place = [] if self.micro_batch is None else [f"micro-batch {self.micro_batch}"]
        place += [] if self.parameter is None else [self.parameter]
        place += [f"{len(self.bad_parameters)} parameters in all"] if len(self.bad_parameters) > 1 else []
        place += _listed("samples", self._samples())
        others = [_who(one) for one in self.culprits[1:]]
        place += _listed("also rank", others)
        where = f" ({', '.join(place)})" if place else ""
        if self.verdict in ("skip", "stop"):
            return f"step {self.step} {self.done}: {self.reason}{where}"
        return f"step {self.step}: {self.reason}; {self.done}{where}"

    def _samples(self) -> list[str]:
        """Each by its index, the first ones with their names."""
        names = [f" ({source})" for source in self.sample_sources[:NAMED]]
        names += [""] * (len(self.sample_indices) - len(names))
        return [f"{index}{name}" for index, name in zip(self.sample_indices, names, strict=True)]


def _who(culprit: Culprit) -> str:
    within = "" if culprit.micro_batch is None else f" in micro-batch {culprit.micro_batch}"
    return f"{culprit.rank}{within}"


def _done(record: StepRecord) -> str:
    if record.verdict != "clip":
        return {"skip": "skipped", "stop": "stopped"}.get(record.verdict, "applied")
    to = f"clipped to {record.grad_norm * record.clip_coef:.4g}"
    return f"{to} because of it" if record.clipped_by_spike else f"{to} as every step is"


def report(incidents: Iterable[Incident]) -> str:
    """The incidents, a line each."""
    return "\n".join(f"  {incident.summary()}" for incident in incidents)


def _located(record: StepRecord, samples_of: SamplesOf | None) -> tuple[tuple[Culprit, ...], tuple[int, ...]]:
    """The culprits with their samples, and all samples to look at."""
    if samples_of is None:
        return record.culprits, ()
    culprits = tuple(
        dataclasses.replace(one, samples=tuple(samples_of(one.rank, one.micro_batch)))
        for one in record.culprits
    )
    if not culprits and (record.skipped or record.is_spike or record.note is not None):
        return (), tuple(samples_of(None, None))
    return culprits, tuple(sample for one in culprits for sample in one.samples)


def _listed(what: str, items: list[str]) -> list[str]:
    """`what` and the first few items as one text; none where there are no items."""
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return [f"{what} {', '.join(items[:SHOWN])}{more}"] if items else []
