"""Doing the same thing on every rank: what fails on one fails on all, at once and with the same words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from harness.errors import HarnessError

__all__ = ["all_reduce_sum", "from_main", "gather", "together"]

T = TypeVar("T")


def together(action: Callable[[], T]) -> T:
    """Runs `action` on every rank; if it fails on one, every rank raises the error of the lowest such rank.

    Only `HarnessError`s are agreed on. Anything else is a defect and ends its process, which the launcher
    notices. One collective on the host; identity without a process group.
    """
    result: T | None = None
    mine: HarnessError | None = None
    try:
        result = action()
    except HarnessError as error:
        mine = error
    for failure in gather(mine):
        if failure is not None:
            raise failure
    return result  # type: ignore[return-value]  # no rank failed, so there is one


def from_main(action: Callable[[], T]) -> T:
    """Runs `action` on rank 0 and gives its result, or raises its `HarnessError`, on every rank."""
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    result = together(action if is_main else lambda: None)
    if not dist.is_initialized():
        return result  # type: ignore[return-value]  # this is rank 0
    holder = [result]
    dist.broadcast_object_list(holder, src=0, device=torch.device("cpu"))
    return holder[0]  # type: ignore[return-value]


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sums `values` over all ranks, in place, on the device that they are on; returns them."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather(value: T) -> list[T]:
    """Every rank's value, by rank. One collective on the host; this one's alone without a process group."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
