"""Records that nobody reads, or that each rank reads when it likes."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from harness.records import StepRecord
from harness.stability import StepGuard, monitor
from tests.support.distributed import run_ranks
from tests.support.guarded import OPTIMIZERS, batch, make_model


def _train(rank: int, *, bad: int, first_drain: int = 0, draining: set[int], wait: bool) -> list[StepRecord]:
    model = DistributedDataParallel(make_model())
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    records = []
    with StepGuard(model, optimizer) as guard:
        for step in range(8):
            inputs, targets = batch(step, rank)
            scale = math.nan if (step, rank) == (bad, 1) else 1.0
            loss = torch.nn.functional.mse_loss(model(inputs * scale), targets)
            loss.backward()
            guard.step(loss)
            optimizer.zero_grad()
            if rank in draining and step >= first_drain:
                records += guard.drain(wait=wait)
    return records + (guard.drain() if rank in draining else [])


def _drained_by_some(rank: int, world_size: int) -> dict[str, list[StepRecord]]:
    return {
        f"{draining} {bad} {first_drain} {wait}": _train(
            rank, draining=draining, bad=bad, first_drain=first_drain, wait=wait
        )
        for draining in ({0}, {1}, {0, 1})
        for bad, first_drain in ((0, 0), (2, 5), (7, 0))
        for wait in (False, True)
    }


def test_each_rank_drains_when_it_likes_and_gets_the_same_records() -> None:
    by_rank = run_ranks(_drained_by_some, 2)
    for name in by_rank[0]:
        had = [records[name] for records in by_rank if records[name]]
        assert had, name
        for records in had:
            assert [record.step for record in records] == list(range(8)), name
            (bad,) = [record for record in records if record.skipped]
            assert (bad.rank, bad.loss != bad.loss) == (1, True)
            # What was asked for before the other ranks could send their rows has none.
            early = name.endswith("True") and bad.step != 2
            assert (list(bad.per_parameter) != []) == (bad.step % 10 == 0 or not early), name
        assert repr(had[0]) == repr(had[-1]), name


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
