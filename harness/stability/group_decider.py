"""From what this rank knows of a step to what becomes of it on all ranks.

Two functions of tensors, each replayed as a CUDA graph (`Graphed`), and between them the one collective.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import fields

import torch
import torch.distributed as dist
from torch import Tensor

from harness.config import GuardConfig
from harness.dist.collectives import all_gather
from harness.stability.graphed import Graphed
from harness.stability.loss_scale import LossScale
from harness.stability.micro_batches import MicroBatches
from harness.stability.packing import Packet, pack, unpack
from harness.stability.rank_statistics import NUM_HOST_FIELDS, build_rank_statistics
from harness.stability.size import SizeCheck
from harness.stability.verdict import Decider, Decision

__all__ = ["GroupDecider"]


class GroupDecider:
    """Gathers the ranks' statistics and decides, step by step. Nothing here synchronises with the device.

    Args:
        group: The ranks that train together; None: this one alone.
        micro_batches: Of the step at hand.
    """

    def __init__(
        self,
        config: GuardConfig,
        *,
        group: dist.ProcessGroup | None,
        num_replicas: int,
        num_shards: int,
        loss_scale: LossScale,
        micro_batches: MicroBatches,
    ) -> None:
        self._group, self._num_shards = group, num_shards
        self._device = loss_scale.value_t.device
        self._micro_batches = micro_batches
        decider = Decider(config, num_replicas=num_replicas)
        self.size: SizeCheck = decider.size
        self._rank_statistics = Graphed(functools.partial(_rank_statistics, micro_batches, loss_scale))
        self._decision = Graphed(
            functools.partial(_decide, decider, loss_scale), state=decider.size.live_state
        )

    def decide(
        self,
        local: Tensor,
        reduced: Tensor,
        *,
        host_fields: Sequence[float],
        faults_t: Tensor,
        is_unscaled: bool,
        nominal_tokens: float,
        sent: Packet,
        same_on_replicas: Packet,
    ) -> tuple[Decision, Packet]:
        """The decision on a step, the same on all ranks, and what all of them said.

        Args:
            local: `[P, 5]` statistics of this rank's own gradient.
            reduced: `[P, 5]` of what the optimizer will use here.
            host_fields: The rank statistics from FAULTS on.
            faults_t: 0-d, to be added to the faults among them.
            is_unscaled: The loop has taken the loss scale out of the gradients.
            nominal_tokens: What the loss was divided by before the backward pass; 0: its own tokens.
            sent: What else goes along to all ranks.
            same_on_replicas: The same, of what need not be sent between replicas.
        """
        host_values_t = self._from_host(
            *host_fields, *self._micro_batches.host_values(), float(is_unscaled), nominal_tokens
        )
        (statistics,) = self._rank_statistics(local, reduced, host_values_t, faults_t)
        packet = self._gather({"rank_statistics": statistics, **sent}, same_on_replicas)
        decision = Decision(*self._decision(packet["rank_statistics"], host_values_t))
        packet["summary"] = decision.summary
        return decision, packet

    def _from_host(self, *values: float) -> Tensor:
        """Host values, `[n]` float64 on the device."""
        host = torch.tensor(values, dtype=torch.float64, pin_memory=self._device.type == "cuda")
        return host.to(self._device, non_blocking=True)

    def _gather(self, packet: Packet, same_on_replicas: Packet) -> Packet:
        """Everything from all ranks, in one message."""
        if self._group is None:
            return {name: tensor[None] for name, tensor in (packet | same_on_replicas).items()}
        # A replica that is not sharded holds all of what is the same on all of them, and need not send it.
        flat, spec = pack(packet | same_on_replicas if self._num_shards > 1 else packet)
        gathered = unpack(all_gather(flat, group=self._group), spec)
        for name, tensor in same_on_replicas.items():
            gathered[name] = gathered[name][: self._num_shards] if self._num_shards > 1 else tensor[None]
        return gathered


def _rank_statistics(
    micro_batches: MicroBatches,
    loss_scale: LossScale,
    local: Tensor,
    reduced: Tensor,
    host_values_t: Tensor,
    faults_t: Tensor,
) -> tuple[Tensor]:
    """This rank's statistics.

    Args:
        host_values_t: The host fields, `MicroBatches.host_values`, whether the loop has unscaled the
            gradients, and the nominal tokens.
        faults_t: 0-d, to be added to the faults among the host fields.
    """
    host_fields, loss, number = host_values_t[:-2].split([NUM_HOST_FIELDS, 3, 1])
    host_fields = torch.cat([host_fields[:1] + faults_t, host_fields[1:]])
    # Earlier micro-batches were measured with the loss scale in the gradient.
    unscaled_by = torch.where(host_values_t[-2] > 0, loss_scale.value_t.double(), 1.0)
    micro_batches.note_gradient(local, number[0], unscaled_by=unscaled_by)
    statistics = build_rank_statistics(
        local,
        reduced,
        loss=micro_batches.loss_t + loss,
        micro_batch=micro_batches.suspect(),
        host_fields=host_fields,
    )
    return (statistics,)


def _decide(
    decider: Decider, loss_scale: LossScale, per_rank: Tensor, host_values_t: Tensor
) -> tuple[Tensor, ...]:
    """The fields of a `Decision`."""
    decision = decider.decide(
        per_rank,
        loss_scale_t=loss_scale.value_t,
        is_unscaled_t=host_values_t[-2] > 0,
        nominal_tokens_t=host_values_t[-1],
    )
    return tuple(getattr(decision, field.name) for field in fields(Decision))
