"""Runs one micro-batch of a step again by itself, whole or some of its samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.data import Batch
from harness.replay.ranks import MicroBatch, RanksInTurn
from harness.stability.layout import NUM_INF, NUM_NAN, SUM_SQUARES
from harness.training.build import build_runner
from harness.training.progress import Progress

__all__ = ["Outcome", "Probe", "rows_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a micro-batch came to."""

    loss: float
    """Sum over its tokens."""
    rows: Tensor
    """`[P, 5]` statistics of the gradient that it leaves."""

    @property
    def is_bad(self) -> bool:
        """Whether loss or gradient are not finite."""
        return not torch.tensor(self.loss).isfinite() or bool(self.rows[:, NUM_NAN : NUM_INF + 1].sum())

    def same_as(self, other: Outcome) -> bool:
        """Bit for bit, as far as loss and statistics tell."""
        mine, theirs = torch.tensor(self.loss), torch.tensor(other.loss)
        return bool(torch.equal(mine.nan_to_num(), theirs.nan_to_num())) and bool(
            torch.equal(self.rows.nan_to_num(), other.rows.nan_to_num())
        )

    @property
    def grad_norm(self) -> float:
        """Over the finite elements."""
        return float(self.rows[:, SUM_SQUARES].sum().sqrt())


class Probe:
    """Runs micro-batches of one step by themselves, from the weights before that step.

    Rehearsed faults strike again, but for those that struck the batch, which holds them already.
    """

    def __init__(self, ranks: RanksInTurn) -> None:
        self.ranks = ranks
        self.num_runs = 0

    def run(
        self,
        micro_batch: MicroBatch,
        rows: Sequence[int] | None = None,
        *,
        batch: Batch | None = None,
        look: Callable[[list[Tensor]], None] | None = None,
        within: Callable[[], Any] = nullcontext,
        precision: str | None = None,
    ) -> Outcome:
        """Forward and backward pass.

        Args:
            rows: Which of its samples; None: all.
            batch: Other data, in the place of its own.
            look: Called while loss and gradients are there.
            within: A context for both passes.
            precision: None: the run's.
        """
        self.num_runs += 1
        ranks = self.ranks
        data = micro_batch.batch if batch is None else batch
        if rows is not None:
            data = rows_of(data, rows, len(micro_batch.samples))
        faults = [
            dataclasses.replace(fault, micro_batch=0)
            for fault in ranks.faults
            if (fault.step, fault.micro_batch) == (micro_batch.step, micro_batch.number)
            and fault.target != "batch"
        ]
        share = ranks.judge.share(micro_batch.step, micro_batch.rank)
        built = build_runner(
            ranks.config,
            ranks.worlds[micro_batch.rank],
            ranks.task,
            ranks.model,
            share,
            ranks.injector(micro_batch.rank, faults),
            precision=precision or ranks.precision,
            progress=Progress(),
        )
        runner = dataclasses.replace(built, num_passes=1)  # no blank ones, which would draw random numbers
        with ranks.as_found_by(micro_batch):
            with within():
                runner.run(micro_batch.step, [data])
            share.finish()
            if look is not None:
                look(share.losses)
            return Outcome(loss=sum(float(one) for one in share.losses), rows=share.rows)


def rows_of(value: Any, rows: Sequence[int], num_samples: int) -> Any:
    """Some samples of a batch: of each tensor and list in it that has one entry for each sample."""
    if isinstance(value, Tensor):
        has_samples = value.dim() > 0 and value.shape[0] == num_samples
        return value[torch.as_tensor(rows, device=value.device)] if has_samples else value
    if isinstance(value, dict):
        return {key: rows_of(item, rows, num_samples) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(rows_of(item, rows, num_samples) for item in value))
    if isinstance(value, list) and len(value) == num_samples and not any(_is_nested(v) for v in value):
        return [value[row] for row in rows]
    if isinstance(value, list | tuple):
        return type(value)(rows_of(item, rows, num_samples) for item in value)
    return value


def _is_nested(value: Any) -> bool:
    return isinstance(value, Tensor | dict | list | tuple)
