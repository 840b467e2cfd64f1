"""The collectives of a step. Gradient hooks call their own; everything else that ranks exchange is here."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

__all__ = ["all_gather"]

# Renamed in torch 2.13, which warns about the old name.
_all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def all_gather(values: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """Every rank's values, in one collective that does not synchronise with the device.

    Args:
        values: `[n]` of any dtype, of the same length on every rank.
        group: The ranks that take part; None: this one alone, without a collective.

    Returns:
        `[world_size, n]`, the same on every rank; row r is rank r's.
    """
    if group is None:
        return values[None]
    gathered = values.new_empty(group.size() * values.numel())
    _all_gather_single(gathered, values.contiguous(), group=group)
    return gathered.view(group.size(), -1)
