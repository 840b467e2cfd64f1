"""This rank's part of a tensor that is spread over ranks."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

__all__ = ["local_part"]

_PLAIN = (Tensor, nn.Parameter)


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a DTensor, the very tensor that it keeps; any other tensor itself.

    `to_local` is a node of autograd, and makes a new view of a parameter: one more object per parameter and step, and
    not the one whose version counts.
    """
    if type(tensor) in _PLAIN:  # torch's isinstance takes ten times as long
        return tensor
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor
