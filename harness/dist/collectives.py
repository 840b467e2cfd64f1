"""The collectives of a step. Gradient hooks call their own; everything else that ranks exchange is here."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

__all__ = ["gather_lanes"]

# Renamed in torch 2.13, which warns about the old name.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def gather_lanes(lane: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """Every rank's lane, in one collective that does not synchronise with the device.

    Args:
        lane: `[n]` of any dtype, of the same length on every rank.
        group: The ranks that take part; None: this one alone, without a collective.

    Returns:
        `[world_size, n]`, the same on every rank; row r is rank r's.
    """
    if group is None:
        return lane[None]
    lanes = lane.new_empty(group.size() * lane.numel())
    _all_gather(lanes, lane.contiguous(), group=group)
    return lanes.view(group.size(), -1)
