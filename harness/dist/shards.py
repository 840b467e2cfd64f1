"""This rank's part of a tensor that is spread over ranks."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

__all__ = ["copy_own_part", "local_part"]

_PLAIN = (Tensor, nn.Parameter)


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a DTensor, the very tensor that it keeps; any other tensor itself.

    `to_local` is a node of autograd, and makes a new view of a parameter: one more object per parameter and step, and
    not the one whose version counts.
    """
    if type(tensor) in _PLAIN:  # torch's isinstance takes ten times as long
        return tensor
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def copy_own_part(whole: Tensor, tensor: Tensor) -> None:
    """Copies of `whole` what this rank holds of a DTensor into it; of any other tensor all. No communication."""
    if isinstance(tensor, DTensor):
        for axis, placement in enumerate(tensor.placements):
            if isinstance(placement, Shard):
                length = whole.size(placement.dim)
                per_rank = -(-length // tensor.device_mesh.size(axis))
                start = min(tensor.device_mesh.get_local_rank(axis) * per_rank, length)
                whole = whole.narrow(placement.dim, start, min(per_rank, length - start))
    local_part(tensor).copy_(whole)
