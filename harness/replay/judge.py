"""The guard's part of a step in which one process plays all ranks: measure, combine, decide, update.

Legend: W ranks, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from harness.config import TrainConfig
from harness.records import StepRecord
from harness.stability.attach import layout_of
from harness.stability.before import WEIGHTS, Before, is_undone, weights_not_finite
from harness.stability.checks.all import Checks
from harness.stability.checks.rows import ROWS
from harness.stability.layout import SUM_SQUARES, Layout
from harness.stability.loss_scale import LossScale
from harness.stability.micro_batches import MicroBatches
from harness.stability.optimizers import Optimizers
from harness.stability.packing import Packet
from harness.stability.rank_statistics import NUM_HOST_FIELDS, Fault, build_rank_statistics
from harness.stability.record_builder import RecordBuilder
from harness.stability.sources import RowTable
from harness.stability.statistics import tensor_statistics
from harness.stability.stepper import OptimizerStepper
from harness.stability.verdict import Decider, Decision

__all__ = ["Judge", "Judged", "RankShare"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What becomes of a step."""

    record: StepRecord
    rows: Tensor
    """`[W, P, 6]` float64: each rank's statistics, and the reduced gradient's sums of squares."""
    decision: Decision
    packet: Packet
    """What the record was made of."""


class Judge:
    """Holds what the guards of all ranks hold alike: loss scale, spike rule, which parameter is which row.

    A checkpoint's guard state can be loaded into it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        config: TrainConfig,
        *,
        world_size: int,
        precision: str,
    ) -> None:
        self._held = held = Optimizers(optimizers)
        self.layout: Layout = layout_of(model, held)
        self._world_size = world_size
        self._is_sharded = config.parallel.strategy == "fsdp"
        device = self.layout.parameters[0].device
        self._num_replicas, self._num_shards = world_size, 1
        if self._is_sharded:
            self._num_replicas, self._num_shards = config.parallel.mesh_shape(world_size, may_refit=True)
        guard = config.guard
        self._decider = Decider(guard, num_replicas=self._num_replicas)
        self.loss_scale = LossScale(
            guard.init_loss_scale,
            growth_steps=guard.loss_scale_growth_steps,
            device=device,
            enabled=precision == "fp16",
        )
        self._undo = guard.undo
        self._stepper = OptimizerStepper(held, guard, device=device)
        self._checks = Checks(guard)
        self._extremes_every = guard.extremes_every
        self.table = RowTable(self.layout)
        self._totals: list[Tensor | None] = [None] * len(self.layout.parameters)

    def state_dict(self) -> dict[str, Any]:
        """As `StepGuard.state_dict`."""
        return {"step": 0, "loss_scale": self.loss_scale.state_dict(), **self._decider.size.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a guard's state."""
        self.loss_scale.load_state_dict(state["loss_scale"])
        self._decider.size.load_state_dict(state)

    def share(self, step: int, rank: int) -> RankShare:
        """What a rank's forward and backward passes of a step are told to."""
        return RankShare(
            rank, self.layout, self.table, self.loss_scale, extremes=step % self._extremes_every == 0
        )

    @torch.no_grad()
    def add(self) -> None:
        """Takes the gradients of one rank out of the parameters; ranks come in their order.

        They are summed up as DDP or FSDP2 do: DDP divides first and adds then, FSDP2 the other way round. A
        parameter that a rank has no gradient of counts as zeros there, unless no rank has one.
        """
        before = 1.0 if self._is_sharded else 1.0 / self._world_size
        for row, parameter in enumerate(self.layout.parameters):
            gradient, parameter.grad = parameter.grad, None
            if gradient is None:
                continue
            total = self._totals[row]
            scaled = gradient.mul(before) if before != 1.0 else gradient
            self._totals[row] = scaled.clone() if total is None else total.add_(scaled)

    @torch.no_grad()
    def combine(self) -> None:
        """Leaves the mean gradient of the ranks that were added in the parameters."""
        for parameter, total in zip(self.layout.parameters, self._totals, strict=True):
            if total is not None and self._is_sharded:
                total.div_(self._world_size)
            parameter.grad = total
        self._totals = [None] * len(self._totals)

    def decide(self, step: int, shares: Sequence[RankShare], *, nominal_tokens: float) -> Judged:
        """The verdict on the step whose combined gradients lie in the parameters."""
        reduced = self._reduced_rows()
        statistics = [share.statistics(rows) for share, rows in zip(shares, reduced, strict=True)]
        per_rank = torch.stack(statistics)
        decision = self._decider.decide(
            per_rank,
            loss_scale_t=self.loss_scale.value_t,
            is_unscaled_t=torch.zeros((), dtype=torch.bool, device=per_rank.device),
            nominal_tokens_t=torch.tensor(nominal_tokens, dtype=torch.float64, device=per_rank.device),
        )
        rows = torch.stack(
            [
                torch.cat([share.rows, one[:, SUM_SQUARES, None]], dim=1)
                for share, one in zip(shares, reduced, strict=True)
            ]
        )
        packet = {
            "rank_statistics": per_rank.cpu(),
            "summary": decision.summary.cpu(),
            ROWS: rows.cpu(),
        }
        record = self._built(step, packet)
        if record.skipped and not math.isfinite(record.loss):
            packet[WEIGHTS] = self._weights().cpu()
            record = self._built(step, packet)
        return Judged(record=record, rows=rows.cpu(), decision=decision, packet=packet)

    @torch.no_grad()
    def update(self, step: int, judged: Judged) -> StepRecord:
        """Applies the step, or leaves it out, and gives its record. An update that is not finite is taken
        back, as the run did; which rank it was is not known where one process has all shards."""
        decision, record = self._stepped(step, judged)
        self.loss_scale.update(overflowed_t=decision.overflowed_t, skip_t=decision.skip_t)
        self._stepper.fused_check.observe(step, skipped=record.skipped, clip_coef=record.clip_coef)
        return record

    @torch.no_grad()
    def try_update(self, step: int, judged: Judged) -> StepRecord:
        """The record that `update` would give. Weights, optimizers and what else a guard keeps are left as
        they are; gradients may be clipped."""
        optimizers = self._held.unwrapped
        if judged.record.skipped or not any(is_undone(optimizer, self._undo) for optimizer in optimizers):
            return judged.record
        before = [Before(optimizer) for optimizer in optimizers]
        try:
            return self._stepped(step, judged)[1]
        finally:
            for one in before:
                one.put_back()

    def _stepped(self, step: int, judged: Judged) -> tuple[Decision, StepRecord]:
        decision, of_update = self._stepper.step(step, judged.decision, self.layout)
        update_packet = {name: tensor.cpu() for name, tensor in of_update.items()}
        packet = {**judged.packet, "summary": decision.summary.cpu(), **update_packet}
        return decision, self._built(step, packet)

    def _weights(self) -> Tensor:
        """`[W, 2]`: `weights_not_finite` of each rank."""
        if not self._is_sharded:
            return weights_not_finite(self.layout).expand(self._world_size, -1)
        parts = [_shards(p.detach(), self._num_shards) for p in self.layout.parameters]
        of_a_copy = [
            weights_not_finite(self.layout, [part[shard] for part in parts])
            for shard in range(self._num_shards)
        ]
        return torch.stack(of_a_copy * self._num_replicas)

    def _built(self, step: int, packet: Packet) -> StepRecord:
        builder = RecordBuilder(self.layout, num_replicas=self._num_replicas, checks=self._checks)
        return builder.build(step, packet, counts_tokens=True)

    def _reduced_rows(self) -> list[Tensor]:
        """`[P, 5]` of what each rank's optimizer uses: the same on replicas, under FSDP2 its shards."""
        if not self._is_sharded:
            return [self.table.measure(extremes=False)] * self._world_size
        having = [p for p in self.layout.parameters if p.grad is not None]
        parts = [_shards(p.grad, self._num_shards) for p in having if p.grad is not None]
        of_a_copy = [
            self.table.spread(having, tensor_statistics([part[shard] for part in parts], extremes=False))
            for shard in range(self._num_shards)
        ]
        return of_a_copy * self._num_replicas


class RankShare:
    """One rank's share of a step: what a `StepRunner` tells its guard of."""

    def __init__(
        self, rank: int, layout: Layout, table: RowTable, loss_scale: LossScale, *, extremes: bool
    ) -> None:
        self.rank, self._layout = rank, layout
        self._table, self._loss_scale, self._extremes = table, loss_scale, extremes
        self._micro_batches = MicroBatches(loss_scale.value_t.device)
        self.losses: list[Tensor] = []
        """Of each micro-batch the sum over its tokens, faults included."""
        self.rows = table.empty()
        """`[P, 5]` statistics of them."""
        self._has_gradient = False

    def accumulate(
        self,
        loss: Tensor,
        num_tokens: Tensor | float | None = None,
        *,
        num_correct: Tensor | float = 0,
        is_last: bool = False,
    ) -> None:
        """Notes a micro-batch after its backward pass."""
        self.losses.append(loss.detach())
        with torch.no_grad():
            self._micro_batches.add_sum(loss, 0.0 if num_tokens is None else num_tokens, num_correct)
            if not is_last:
                rows = self._table.measure(extremes=False)
                self._micro_batches.note_gradient(rows, self._micro_batches.num - 1)

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the loss scale of fp16."""
        return loss * self._loss_scale.value_t if self._loss_scale.enabled else loss

    @contextmanager
    def watch_forward(self) -> Iterator[None]:
        """Nothing is watched."""
        yield

    def finish(self) -> None:
        """Measures the gradients that lie in the parameters."""
        self.rows = self._table.measure(extremes=self._extremes)
        self._has_gradient = any(p.grad is not None for p in self._layout.parameters)

    @torch.no_grad()
    def statistics(self, reduced: Tensor) -> Tensor:
        """This rank's statistics of the step, `[17]`; `reduced` is `[P, 5]`."""
        loss_sum, num_tokens, num_correct, number = self._micro_batches.host_values()
        self._micro_batches.note_gradient(self.rows, number)
        device = self.rows.device
        host = torch.zeros(NUM_HOST_FIELDS, dtype=torch.float64, device=device)
        host[0] = 0.0 if self._has_gradient else float(Fault.NO_GRADIENT)
        counts = torch.tensor([loss_sum, num_tokens, num_correct], dtype=torch.float64, device=device)
        return build_rank_statistics(
            self.rows,
            reduced,
            loss=self._micro_batches.loss_t + counts,
            micro_batch=self._micro_batches.suspect(),
            host_fields=host,
        )


def _shards(gradient: Tensor, num_shards: int) -> list[Tensor]:
    """The pieces along the first dimension that FSDP2 gives the ranks; the last ones may be empty."""
    length = -(-gradient.shape[0] // num_shards) if gradient.dim() else 1
    whole = gradient if gradient.dim() else gradient.view(1)
    return [whole[shard * length : (shard + 1) * length].contiguous() for shard in range(num_shards)]
