"""Whether replicas are still the same: bit-exact checksums of parameters and optimizer state.

Buffers are left out: BatchNorm's statistics differ between ranks by design.

Legend: R replicas, S shards of each, P parameters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.config import GuardConfig
from harness.stability.checks.base import Arrived, Check, Reading, StepView
from harness.stability.checks.fingerprint import sum_of_bits
from harness.stability.optimizers import StateOf

__all__ = ["DifferingReplica", "ReplicaCheck", "checksums", "find_differing"]


@dataclass(frozen=True, slots=True)
class DifferingReplica:
    """Where replicas differ."""

    rank: int | None
    """The rank that differs from the majority; None where there is no majority, as between two."""
    row: int
    """The first parameter that is, or whose optimizer state is, not the same everywhere."""


class ReplicaCheck(Check):
    """Checksums of what the previous step left behind, compared between the replicas."""

    name = "checksums"

    def __init__(self, config: GuardConfig) -> None:
        self.every = config.replicas_every if config.replicas != "off" else 0

    def measure(self, view: StepView) -> Tensor | None:
        """`[P]`, where there are replicas to compare."""
        return checksums(view.layout.parameters, view.state_of) if view.num_replicas > 1 else None

    def read(self, numbers: Tensor, arrived: Arrived) -> Reading:
        """Of `[W, P]`."""
        differing = find_differing(numbers.view(arrived.num_replicas, -1, numbers.shape[-1]))
        if differing is None:
            return Reading()
        parameter = arrived.layout.names[differing.row]
        who = "replicas differ" if differing.rank is None else f"rank {differing.rank} differs"
        return Reading(
            reason=f"{who} in {parameter} or its optimizer state",
            rank=differing.rank,
            parameter=parameter,
            fields={"replicas_differ": True},
        )


def checksums(parameters: Sequence[nn.Parameter], state_of: StateOf) -> Tensor:
    """`[P]` int64: for each parameter an integer sum over the raw bits of it and of its optimizer state.

    Reads everything once; does not synchronise. Sums are exact, so the order of summation does not matter.
    """
    return torch.stack([_of_parameter(p, state_of(p)) for p in parameters])


def find_differing(sums: Tensor) -> DifferingReplica | None:
    """The replica that differs, or None if all are the same.

    Args:
        sums: `[R, S, P]` int64 on the host.
    """
    differs = (sums != sums[:1]).any(0)
    if not bool(differs.any()):
        return None
    shard, row = (int(where[0]) for where in differs.nonzero(as_tuple=True))
    values = [tuple(replica[shard].tolist()) for replica in sums]
    (common, count), *_ = Counter(values).most_common()
    differing = next(replica for replica, value in enumerate(values) if value != common)
    return DifferingReplica(
        rank=differing * sums.shape[1] + shard if 2 * count > len(values) else None, row=row
    )


def _of_parameter(parameter: nn.Parameter, state: Mapping[str, Any]) -> Tensor:
    tensors = [parameter] + [value for _, value in sorted(state.items()) if isinstance(value, Tensor)]
    total = torch.zeros((), dtype=torch.int64, device=parameter.device)
    for position, tensor in enumerate(tensors):
        # Odd weights, so that opposite changes in two tensors do not cancel.
        total += (2 * position + 1) * sum_of_bits(tensor).to(parameter.device, non_blocking=True)
    return total
