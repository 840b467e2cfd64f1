"""An update that is not finite on one rank is taken back on all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW

from harness.dist import ShardedMuon, local_part
from harness.stability import StepGuard
from tests.support.distributed import run_ranks
from tests.support.guarded import batch, make_model, snapshot, worst_difference

LARGEST = torch.finfo(torch.float32).max


def _train(rank: int, world_size: int, wrap: str, optimizer: str) -> list[Any]:
    """Per step: verdict, culprit and parameter of the record, and whether anything changed on this rank."""
    model = make_model(width=8)
    if wrap == "fsdp":
        fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (world_size,)))
    wrapped = DistributedDataParallel(model) if wrap == "ddp" else model
    hidden = model[2].weight
    rest = [p for p in model.parameters() if p is not hidden]
    kind = torch.optim.Muon if wrap == "ddp" else ShardedMuon
    unfused = kind([hidden], lr=0.1) if optimizer == "muon" else SGD([hidden], lr=0.1, momentum=0.9)
    fused = AdamW(rest, lr=1e-2, fused=True)
    undo = "auto" if optimizer == "muon" else "always"
    guard = StepGuard(wrapped, [fused, unfused], max_norm=None, undo=undo, lag_steps=0)
    said = []
    for step in range(3):
        inputs, targets = batch(step, rank)
        loss = nn.functional.mse_loss(wrapped(inputs), targets)
        loss.backward()
        if step == 1:
            unfused.param_groups[0]["weight_decay"] = -1e10
            if rank == 1:
                local_part(hidden.detach()).fill_(LARGEST)
        found = {**snapshot(model, fused), **snapshot(model, unfused)}
        guard.step(loss)
        changed = worst_difference(found, {**snapshot(model, fused), **snapshot(model, unfused)})
        model.zero_grad()
        (record,) = guard.drain(wait=True)
        said.append([record.verdict, record.undone, record.rank, record.parameter, bool(changed)])
        if step == 1:
            unfused.param_groups[0]["weight_decay"] = 0.0
            if rank == 1:
                local_part(hidden.detach()).fill_(0.1)
    return said


@pytest.mark.parametrize("optimizer", ["muon", "sgd"])
@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_what_one_ranks_update_breaks_is_made_on_none(wrap: str, optimizer: str) -> None:
    sound, undone = ["apply", False, None, None, True], ["skip", True, 1, "2.weight", False]
    assert run_ranks(_train, 2, wrap, optimizer) == [[sound, undone, sound]] * 2


def _broken_by_fused(rank: int, world_size: int, wrap: str) -> tuple[str, Any, Any, bool]:
    model = make_model(width=8)
    if wrap == "fsdp":
        fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (world_size,)))
    wrapped = DistributedDataParallel(model) if wrap == "ddp" else model
    guard = StepGuard(wrapped, AdamW(model.parameters(), lr=1e-2, fused=True), lag_steps=0)
    for step in range(2):
        inputs, targets = batch(step, rank)
        loss = nn.functional.mse_loss(wrapped(inputs), targets)
        loss.backward()
        guard.step(loss)
        model.zero_grad()
        if step == 0 and (rank == 1 or wrap == "ddp"):
            local_part(model[2].weight.detach()).view(-1)[-1:] = torch.nan
    record = guard.drain(wait=True)[-1]
    return record.verdict, record.rank, record.parameter, "an earlier update made it so" in str(record.reason)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_weights_that_a_fused_optimizer_has_broken_are_named_with_the_next_loss(wrap: str) -> None:
    rank = 1 if wrap == "fsdp" else 0
    assert run_ranks(_broken_by_fused, 2, wrap) == [("skip", rank, "2.weight", True)] * 2
