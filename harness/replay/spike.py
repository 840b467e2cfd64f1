"""Who carries a gradient that is finite and too large: which samples, and which parameters."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from harness.records import StepRecord
from harness.replay.probe import Probe
from harness.replay.ranks import MicroBatch

__all__ = ["Carriers", "ParameterShare", "SampleNorm", "find_carriers"]

MOST_SAMPLES = 256
"""Samples that are run by themselves."""
STANDS_OUT = 5.0
"""Times the median of the samples' norms."""
MOST_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleNorm:
    """A sample, and the norm of its own gradient as a part of the step's."""

    sample: int
    rank: int
    micro_batch: int
    grad_norm: float
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterShare:
    """A parameter, and how much of the gradient it has."""

    name: str
    grad_norm: float
    share: float
    """Of the step's squared norm, from 0 to 1."""
    usual_norm: float | None
    """In the step before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Carriers:
    """Who carries a spike."""

    samples: tuple[SampleNorm, ...]
    """The largest, first."""
    median: float
    """Of the norms of all that were run."""
    num_samples: int
    parameters: tuple[ParameterShare, ...]

    @property
    def outstanding(self) -> tuple[SampleNorm, ...]:
        """Those that are far larger than the others."""
        return tuple(one for one in self.samples if one.grad_norm > STANDS_OUT * self.median)


def find_carriers(
    probe: Probe, passes: Sequence[MicroBatch], record: StepRecord, before: StepRecord | None
) -> Carriers:
    """Runs each sample of the step by itself, those of the outstanding rank first.

    Args:
        before: The record of the step before, for comparison.
    """
    ordered = sorted(passes, key=lambda one: (one.rank != record.rank, one.rank, one.number))
    norms: list[SampleNorm] = []
    for one in ordered:
        for row, sample in enumerate(one.samples[: MOST_SAMPLES - len(norms)]):
            outcome = probe.run(one, [row])
            norms.append(
                SampleNorm(
                    sample=sample,
                    rank=one.rank,
                    micro_batch=one.number,
                    grad_norm=outcome.grad_norm,
                    loss=outcome.loss,
                )
            )
    norms.sort(key=lambda one: -one.grad_norm)
    return Carriers(
        samples=tuple(norms[:MOST_SHOWN]),
        median=statistics.median(one.grad_norm for one in norms),
        num_samples=len(norms),
        parameters=_shares(record, before),
    )


def _shares(record: StepRecord, before: StepRecord | None) -> tuple[ParameterShare, ...]:
    usual = {} if before is None else before.per_parameter
    total = sum(row.grad_norm**2 for row in record.per_parameter.values()) or 1.0
    shares = [
        ParameterShare(
            name=name,
            grad_norm=row.grad_norm,
            share=row.grad_norm**2 / total,
            usual_norm=usual[name].grad_norm if name in usual else None,
        )
        for name, row in record.per_parameter.items()
    ]
    return tuple(sorted(shares, key=lambda one: -one.share)[:MOST_SHOWN])
