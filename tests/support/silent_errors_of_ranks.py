"""Loops on two ranks that are wrong in one place each and say nothing, and the same ones mended."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from harness import StepGuard
from tests.support.silent_errors import adamw, found_in, network, points, square

__all__ = ["TOGETHER", "all_of_them"]


def not_cleared_under_ddp(broken: bool, rank: int) -> list[str]:
    model = DistributedDataParallel(network())
    return found_in(model, adamw(model), clear=(lambda: None) if broken else None, rank=rank)


def wrapper_bypassed(broken: bool, rank: int) -> list[str]:
    model = DistributedDataParallel(network())
    called = model.module if broken else model

    def step(number: int, guard: StepGuard) -> Tensor:
        return square(called, points(number, rank))

    return found_in(model, adamw(model), step=step, rank=rank, ladder=False)


def replicas_differ(broken: bool, rank: int) -> list[str]:
    model = DistributedDataParallel(network())
    if broken and rank == 1:
        nn.init.ones_(model.module.first.bias)
    return found_in(model, adamw(model), rank=rank)


def same_data_on_all_ranks(broken: bool, rank: int) -> list[str]:
    model = DistributedDataParallel(network())
    return found_in(model, adamw(model), rank=0 if broken else rank)


def same_dropout_on_all_ranks(broken: bool, rank: int) -> list[str]:
    model = DistributedDataParallel(network(act=nn.Dropout(0.5)))
    torch.manual_seed(7 if broken else 7 + rank)
    return found_in(model, adamw(model), rank=rank)


def samples_in_another_order_on_each_rank(broken: bool, rank: int) -> list[str]:
    model = DistributedDataParallel(network())

    def step(number: int, guard: StepGuard) -> Tensor:
        batch = points(number, rank=0 if broken else rank)
        return square(model, batch[torch.randperm(6, generator=torch.Generator().manual_seed(rank))])

    return found_in(model, adamw(model), step=step, rank=rank)


def each_rank_goes_through_all_of_the_data(broken: bool, rank: int) -> list[str]:
    model = DistributedDataParallel(network())
    data = points(0, size=1200)
    order = torch.randperm(1200, generator=torch.Generator().manual_seed(rank if broken else 0))
    slices = order if broken else order[rank::2]

    def step(number: int, guard: StepGuard) -> Tensor:
        return square(model, data[slices[12 * number : 12 * number + 12]])

    return found_in(model, adamw(model), step=step, rank=rank, num_steps=48)


class Masked(nn.Module):
    """Two layers and a constant mask between them."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.inner = network()
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.mask)


def constant_buffers_differ(broken: bool, rank: int) -> list[str]:
    mask = torch.tensor([1.0, 1.0, 1.0, 0.5 if broken and rank else 1.0])
    model = DistributedDataParallel(Masked(mask), forward_sync_buffers=False, init_sync=False)
    return found_in(model, adamw(model), rank=rank)


def bit_flipped_in_a_shard(broken: bool, rank: int) -> list[str]:
    model = fully_shard(network(first=nn.Linear(4, 16), last=nn.Linear(16, 3)))
    optimizer = adamw(model)

    def after(number: int, guard: StepGuard) -> None:
        if broken and number == 7 and rank == 1:
            shard = optimizer.state[model.first.weight]["exp_avg_sq"].to_local()
            shard.view(torch.int32).numpy()[1, 2] ^= 1 << 3

    return found_in(model, optimizer, after=after, rank=rank, state_every=1)


TOGETHER: dict[Callable[[bool, int], list[str]], str] = {
    not_cleared_under_ddp: "cleared",
    wrapper_bypassed: "incident",
    replicas_differ: "incident",
    same_data_on_all_ranks: "shared batch",
    samples_in_another_order_on_each_rank: "shared batch",
    each_rank_goes_through_all_of_the_data: "overlapping slices",
    same_dropout_on_all_ranks: "generators",
    constant_buffers_differ: "constants",
    bit_flipped_in_a_shard: "incident",
}
"""Loops of two ranks, and the check that names each."""


def all_of_them(rank: int, world_size: int) -> dict[str, tuple[list[str], list[str]]]:
    """By name, what is found in the broken and in the mended loop."""
    return {loop.__name__: (loop(True, rank), loop(False, rank)) for loop in TOGETHER}
