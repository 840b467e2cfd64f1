"""Records that nobody reads, or that only some ranks read."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from harness.errors import ConfigError
from harness.stability import StepGuard, monitor
from tests.support.distributed import run_ranks
from tests.support.guarded import OPTIMIZERS, batch, make_model


def _train(rank: int, *, draining: set[int], bad: int, first_drain: int = 0) -> None:
    model = DistributedDataParallel(make_model())
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    guard = StepGuard(model, optimizer)
    for step in range(8):
        inputs, targets = batch(step, rank)
        loss = torch.nn.functional.mse_loss(model(inputs * (math.nan if step == bad else 1.0)), targets)
        loss.backward()
        guard.step(loss)
        optimizer.zero_grad()
        if rank in draining and step >= first_drain:
            guard.drain()


def _drained_by_some(rank: int, world_size: int) -> None:
    for draining, bad in (({0}, 9), ({1}, 0), ({0}, 1)):
        with pytest.raises(
            ConfigError, match=f"on ranks {min(draining)}, but not on ranks {1 - min(draining)}"
        ):
            _train(rank, draining=draining, bad=bad)
    with pytest.raises(ConfigError, match="on ranks 1, but not on ranks 0"):
        _train(rank, draining={1}, bad=2, first_drain=5)
    _train(rank, draining=set(), bad=2)
    _train(rank, draining={0, 1}, bad=2, first_drain=5)


def test_a_drain_on_some_ranks_only_is_an_error_on_all() -> None:
    run_ranks(_drained_by_some, 2)


def test_what_is_never_drained_is_bounded_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(monitor, "MAX_PENDING_BYTES", 40_000)
    model = make_model()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    guard = StepGuard(model, optimizer, per_parameter_every=0, sample_every=0)
    with caplog.at_level(logging.WARNING):
        for step in range(40):
            loss = model(batch(step)[0]).square().mean()
            loss.backward()
            guard.step(loss)
            optimizer.zero_grad()
    (message,) = [record.message for record in caplog.records if "drain" in record.message]
    assert "from step 0 on the oldest are dropped" in message
    steps = [record.step for record in guard.drain(wait=True)]
    assert steps == list(range(steps[0], 40))
    assert 3 < len(steps) < 12
    assert guard.drain(wait=True) == []
