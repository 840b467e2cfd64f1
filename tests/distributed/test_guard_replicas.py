"""Replicas that drift apart are found, and the odd one is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from harness.errors import ConfigError
from harness.records import StepRecord
from harness.stability import StepGuard
from harness.stability.checks.replicas import checksums, find_differing
from tests.support.distributed import run_ranks
from tests.support.guarded import OPTIMIZERS, batch, make_model


def _flip(tensor: Tensor) -> None:
    """Flips one bit of one element, high enough not to be rounded away before it is looked for."""
    local = getattr(tensor, "_local_tensor", tensor).detach().view(-1)
    local.view(torch.int32)[0] ^= 1 << 12


def _train(rank: int, world_size: int, wrap: str, damage: str, odd: int) -> list[StepRecord]:
    model = make_model()
    if wrap == "ddp":
        model = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    guard = StepGuard(model, optimizer, replicas_every=3)
    weight = dict(model.named_parameters())["module.2.weight" if wrap == "ddp" else "2.weight"]
    for step in range(7):
        inputs, targets = batch(step, rank)
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        guard.step(loss)
        optimizer.zero_grad()
        if step == 3 and rank == odd:
            _flip(weight if damage == "weight" else optimizer.state[weight]["exp_avg"])
    return guard.drain(wait=True)


@pytest.mark.parametrize("damage", ["weight", "state"])
def test_one_flipped_bit_is_found_and_the_odd_rank_named(damage: str) -> None:
    records = run_ranks(_train, 3, "ddp", damage, 1)[0]
    assert [r.replicas_differ for r in records] == [False] * 6 + [True]
    found = records[6]
    assert (found.rank, found.parameter) == (1, "2.weight" if damage == "state" else found.parameter)
    assert found.reason is not None
    assert "rank 1 differs in" in found.reason
    assert found.verdict in ("apply", "clip")


def test_between_two_replicas_the_parameter_is_named_and_nobody_blamed() -> None:
    records = run_ranks(_train, 4, "hsdp", "state", 3)[0]
    found = records[6]
    assert (found.replicas_differ, found.rank, found.parameter) == (True, None, "2.weight")
    assert found.reason == "replicas differ in 2.weight or its optimizer state"


def _bypass(rank: int, world_size: int) -> list[StepRecord]:
    model = DistributedDataParallel(make_model())
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    guard = StepGuard(model, optimizer, replicas_every=0)
    for step in range(2):
        inputs, targets = batch(step, rank)
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        if step == 1 and rank == 1:  # a reduction that lost something
            model.module[0].weight.grad[0, 0] += 0.1
        guard.step(loss)
        optimizer.zero_grad()
    return guard.drain(wait=True)


def test_reduced_gradients_that_differ_are_noticed_in_the_same_step() -> None:
    records, other = run_ranks(_bypass, 2)
    assert records == other
    assert [r.replicas_differ for r in records] == [False, True]
    assert records[1].reason == "reduced gradients differ between replicas"


def test_checksums_see_a_swap_between_two_states_and_any_dtype() -> None:
    model = nn.Linear(3, 3, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    before = checksums(list(model.parameters()), optimizer.state.__getitem__)
    assert torch.equal(before, checksums(list(model.parameters()), optimizer.state.__getitem__))
    state: dict[str, Any] = optimizer.state[model.weight]
    state["exp_avg"], state["exp_avg_sq"] = state["exp_avg_sq"], state["exp_avg"]
    after = checksums(list(model.parameters()), optimizer.state.__getitem__)
    assert (before != after).tolist() == [True, False]


def test_the_majority_decides_which_replica_differs() -> None:
    sums = torch.tensor([[[1, 2]], [[1, 2]], [[1, 3]]])
    differing = find_differing(sums)
    assert differing is not None
    assert (differing.rank, differing.row) == (2, 1)
    assert find_differing(sums[:2]) is None


def test_an_even_cadence_is_refused() -> None:
    with pytest.raises(ConfigError, match="odd"):
        StepGuard(make_model(), OPTIMIZERS["sgd"](make_model().parameters()), replicas_every=10)
