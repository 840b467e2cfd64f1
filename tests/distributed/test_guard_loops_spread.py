"""Loops of three lines on two ranks: what ends one ends both; what DDP leaves alone is measured as it is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from harness.errors import InstabilityError
from harness.stability import Incident, StepGuard
from tests.support.distributed import run_ranks
from tests.support.guarded import OPTIMIZERS, batch, make_model, snapshot


def _loss(model: torch.nn.Module, step: int, rank: int, scale: float = 1.0) -> torch.Tensor:
    inputs, targets = batch(step, rank)
    return torch.nn.functional.mse_loss(model(inputs * scale), targets)


def _ended(rank: int, world_size: int) -> tuple[int, str, list[str]]:
    model = DistributedDataParallel(make_model())
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    incidents: list[Incident] = []
    guard = StepGuard(model, optimizer, on_incident=incidents.append)

    def train() -> None:
        for step in range(60):
            loss = _loss(model, step, rank, math.nan if rank == 1 and step > 2 else 1.0)
            loss.backward()
            guard.step(loss)
            optimizer.zero_grad()

    with pytest.raises(InstabilityError) as caught:
        train()
    assert all(torch.isfinite(value).all() for value in snapshot(model, optimizer).values())
    return guard.next_step, str(caught.value), [one.summary() for one in incidents]


def test_a_run_in_trouble_ends_on_all_ranks_at_the_same_step() -> None:
    ours, theirs = run_ranks(_ended, 2)
    assert ours == theirs
    assert ours[0] == 9
    assert "step 3 skipped: the loss is nan on rank 1 (0.weight, 6 parameters in all)" in ours[1]
    assert len(ours[2]) == 4


def _ignored(rank: int, world_size: int) -> dict[bool, list[float]]:
    """Norms of this rank's own gradients, with the first layer left alone by DDP."""
    norms: dict[bool, list[float]] = {}
    for unscales in (False, True):
        inner = make_model()
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(inner, ["0.weight"])
        model = DistributedDataParallel(inner)
        optimizer = OPTIMIZERS["sgd-plain"](model.parameters())
        guard = StepGuard(model, optimizer, replicas="off")
        scaler: Any = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(2):
            loss = _loss(model, step, rank)
            scaler.scale(loss).backward()
            if unscales:
                scaler.unscale_(optimizer)
            guard.step(loss, scaler=scaler)
            scaler.update()
            optimizer.zero_grad()
        norms[unscales] = [r.per_rank[rank].grad_norm for r in guard.drain(wait=True)]
    return norms


def test_a_loop_that_unscales_has_the_same_norms_of_what_ddp_leaves_alone() -> None:
    for norms in run_ranks(_ignored, 2):
        assert norms[True] == pytest.approx(norms[False], rel=1e-6)
