"""A step that is skipped because of one rank changes the buffers of none."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from harness.stability import StepGuard
from tests.support.distributed import run_ranks
from tests.support.guarded import OPTIMIZERS, batch

STEPS, BAD = 4, 2


def _wrapped(model: nn.Module, how: str) -> nn.Module:
    if how == "fsdp":
        return fully_shard(model)
    return DistributedDataParallel(model, broadcast_buffers=how == "ddp, rank 0's")


def _train(model: nn.Module, rank: int, *, bad: bool) -> list[list[Tensor]]:
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    guard = StepGuard(model, optimizer)
    seen = []
    for step in range(STEPS):
        if step == BAD and not bad:
            continue
        inputs, targets = batch(step, rank)
        if (step, rank) == (BAD, 1):
            inputs[0] = math.nan
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        guard.step(loss)
        optimizer.zero_grad()
        seen.append([buffer.clone() for buffer in model.buffers()])
    assert [record.skipped for record in guard.drain(wait=True)] == [
        bad and step == BAD for step, _ in enumerate(seen)
    ]
    return seen


def _compare(rank: int, world_size: int) -> None:
    for how in ("ddp, rank 0's", "ddp, each its own", "fsdp"):
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        model, twin = _wrapped(copy.deepcopy(plain), how), _wrapped(plain, how)
        have, want = _train(model, rank, bad=True), _train(twin, rank, bad=False)
        assert all(map(torch.equal, have[BAD], have[BAD - 1])), how
        del have[BAD]
        for one, other in zip(have, want, strict=True):
            assert len(one) == 3
            assert all(map(torch.equal, one, other)), how


def test_buffers_of_all_ranks_are_as_if_the_skipped_step_had_never_been() -> None:
    run_ranks(_compare, 2)
