"""The guard in loops as people write them: three lines and no more, accumulation, clipping, schedules."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.errors import ConfigError, InstabilityError
from harness.records import StepRecord
from harness.stability import Incident, StepGuard
from tests.support.guarded import OPTIMIZERS, batch, make_model, snapshot, worst_difference

Spoil = Callable[[int], float]
"""What a step's inputs are multiplied by."""


def _loss(model: nn.Module, step: int, micro_batch: int = 0, scale: float = 1.0) -> Tensor:
    inputs, targets = batch(step, micro_batch=micro_batch)
    return nn.functional.mse_loss(model(inputs * scale), targets)


def _nan_from(first: int, last: int = 1 << 30) -> Spoil:
    return lambda step: math.nan if first <= step < last else 1.0


def _train(
    guard: StepGuard, model: nn.Module, optimizer: Any, *, spoil: Spoil, num_steps: int, first: int = 0
) -> None:
    """A loop of three lines."""
    for step in range(first, num_steps):
        loss = _loss(model, step, scale=spoil(step))
        loss.backward()
        guard.step(loss)
        optimizer.zero_grad()


def _guarded(**settings: Any) -> tuple[StepGuard, nn.Module, torch.optim.Optimizer]:
    model = make_model()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    return StepGuard(model, optimizer, **settings), model, optimizer


def test_a_loop_that_reads_no_records_stops_with_the_report() -> None:
    guard, model, optimizer = _guarded()
    with pytest.raises(InstabilityError, match="4 steps in a row were skipped") as caught:
        _train(guard, model, optimizer, spoil=_nan_from(5), num_steps=65)
    assert "step 5 skipped: the loss is nan on rank 0" in str(caught.value)
    assert guard.next_step == 5 + 4 + 2  # the fourth bad one, two steps later
    assert all(torch.isfinite(p).all() for p in model.parameters())
    with_own, model, optimizer = _guarded(ladder=False)
    _train(with_own, model, optimizer, spoil=_nan_from(5), num_steps=65)


def test_a_callable_rolls_back_as_often_as_the_ladder_lets_it() -> None:
    guard, model, optimizer = _guarded(max_rollbacks=2, rollback_cooldown_steps=2, rollback=lambda r: back(r))
    _train(guard, model, optimizer, spoil=_nan_from(99), num_steps=4)
    sound = copy.deepcopy((model.state_dict(), optimizer.state_dict(), guard.state_dict()))
    asked: list[int] = []

    def back(record: StepRecord) -> bool:
        asked.append(record.step)
        for part, state in zip((model, optimizer, guard), copy.deepcopy(sound), strict=True):
            part.load_state_dict(state)
        return True

    _train(guard, model, optimizer, spoil=_nan_from(6, 10), num_steps=12, first=4)
    assert asked == [9]
    assert guard.next_step == 4
    assert [r.step for r in guard.drain(wait=True)] == []
    _train(guard, model, optimizer, spoil=_nan_from(3, 7), num_steps=9)
    with pytest.raises(InstabilityError, match="after 2 rollbacks"):
        _train(guard, model, optimizer, spoil=_nan_from(5), num_steps=30)
    assert len(asked) == 2


def test_a_rollback_that_cannot_be_ends_the_run() -> None:
    guard, model, optimizer = _guarded(rollback=lambda record: False)
    with pytest.raises(InstabilityError, match="no healthy checkpoint"):
        _train(guard, model, optimizer, spoil=_nan_from(0), num_steps=20)


def test_incidents_are_handed_over_and_those_of_the_last_steps_when_the_guard_is_left(
    caplog: pytest.LogCaptureFixture,
) -> None:
    incidents: list[Incident] = []
    guard, model, optimizer = _guarded(on_incident=incidents.append)
    with caplog.at_level(logging.WARNING), guard:
        _train(guard, model, optimizer, spoil=lambda step: math.nan if step in (2, 7) else 1.0, num_steps=8)
        assert [one.step for one in incidents] == [2]
    assert [one.step for one in incidents] == [2, 7]
    assert [m for m in caplog.messages if "skipped" in m] == [one.summary() for one in incidents]
    assert [r.step for r in guard.drain()] == list(range(8))


def test_a_guard_that_is_left_by_an_error_raises_no_other() -> None:
    with pytest.raises(ZeroDivisionError), _guarded()[0]:
        raise ZeroDivisionError


def test_the_ladder_goes_on_where_it_was_saved() -> None:
    guard, model, optimizer = _guarded()
    _train(guard, model, optimizer, spoil=_nan_from(3), num_steps=6)
    guard.flush()
    state = guard.state_dict()
    resumed, model, optimizer = _guarded()
    resumed.load_state_dict(state)
    with pytest.raises(InstabilityError, match="4 steps in a row"):
        _train(resumed, model, optimizer, spoil=_nan_from(0), num_steps=9, first=6)
    assert resumed.next_step == 9


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_applied_tells_averages_and_counters_on_the_device(name: str) -> None:
    model = make_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    guard = StepGuard(model, optimizer)
    assert not guard.applied
    count, seen = torch.zeros((), dtype=torch.int64), []
    for step in range(5):
        loss = _loss(model, step, scale=math.nan if step in (0, 3) else 1.0)
        loss.backward()
        guard.step(loss)
        optimizer.zero_grad()
        count += guard.applied
        seen.append(bool(guard.applied))
    assert (seen, int(count)) == ([False, True, True, False, True], 3)
    assert guard.applied.shape == ()


@pytest.mark.parametrize("name", ["adamw", "sgd", "rmsprop"])
def test_a_schedule_does_not_warn_of_a_first_step_that_was_skipped(name: str) -> None:
    model = make_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    guard = StepGuard(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            loss = _loss(model, step, scale=math.nan if step == 0 else 1.0)
            loss.backward()
            guard.step(loss)
            schedule.step()
            optimizer.zero_grad()
    assert [r.verdict == "skip" for r in guard.drain(wait=True)] == [True, False, False]


@pytest.mark.parametrize("max_norm", [0, 0.0, None])
def test_a_largest_norm_of_zero_is_none(max_norm: float | None) -> None:
    guard, model, optimizer = _guarded(max_norm=max_norm)
    twin = make_model()
    reference = OPTIMIZERS["adamw"](twin.parameters())
    for step in range(3):
        loss = _loss(model, step, scale=100.0)
        loss.backward()
        guard.step(loss)
        _loss(twin, step, scale=100.0).backward()
        reference.step()
        optimizer.zero_grad()
        reference.zero_grad()
    assert worst_difference(snapshot(model, optimizer), snapshot(twin, reference)) == ""
    assert {r.verdict for r in guard.drain(wait=True)} == {"apply"}


NUM_MICRO_BATCHES = 3


def _accumulate(how: str, *, bad: tuple[int, int] | None) -> tuple[list[StepRecord], dict[str, Tensor]]:
    """Four steps of three micro-batches, of which `bad` (step, micro-batch) has a NaN."""
    model = make_model()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    guard = StepGuard(model, optimizer)
    for step in range(4):
        for index in range(NUM_MICRO_BATCHES):
            loss = _loss(model, step, index)
            (loss / NUM_MICRO_BATCHES).backward()
            if (step, index) == bad:
                model[2].weight.grad[0, 0] = math.nan
            if how == "means":
                guard.accumulate(loss, weight=1 / NUM_MICRO_BATCHES)
            elif how == "sums":
                guard.accumulate(loss * 5, 5)
            elif how == "plain":
                guard.accumulate(loss)
        guard.step(loss) if how == "step alone" else guard.step()
        optimizer.zero_grad()
    return guard.drain(wait=True), snapshot(model, optimizer)


@pytest.mark.parametrize("how", ["means", "sums", "plain", "step alone"])
def test_a_loop_that_accumulates_is_right_however_it_tells_its_losses(how: str) -> None:
    model = make_model()
    reference = OPTIMIZERS["adamw"](model.parameters())
    losses = []
    for step in range(4):
        parts = [_loss(model, step, index) for index in range(NUM_MICRO_BATCHES)]
        for part in parts:
            (part / NUM_MICRO_BATCHES).backward()
        told = parts[-1:] if how == "step alone" else parts
        losses.append(sum(part.item() for part in told) / len(told))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        reference.step()
        reference.zero_grad()
    records, weights = _accumulate(how, bad=None)
    for name, value in snapshot(model, reference).items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-6)
    assert [record.loss for record in records] == pytest.approx(losses, rel=1e-6)
    assert [record.num_tokens for record in records] == [15 if how == "sums" else 0] * 4

    records, _ = _accumulate(how, bad=(1, 1))
    assert [record.skipped for record in records] == [False, True, False, False]
    culprit = (records[1].rank, records[1].parameter, records[1].micro_batch)
    assert culprit == (0, "2.weight", None if how == "step alone" else 1)


def test_a_weight_that_is_not_one_number_and_two_units_in_a_step_are_errors() -> None:
    guard, model, _ = _guarded()
    loss = _loss(model, 0)
    loss.backward()
    with pytest.raises(ConfigError, match=r"the weight is '0\.5'"):
        guard.accumulate(loss, weight="0.5")  # type: ignore[arg-type]
    guard.accumulate(loss, weight=torch.tensor(0.5))
    with pytest.raises(ConfigError, match="some micro-batches of a step with num_tokens"):
        guard.accumulate(loss * 5, 5)


@pytest.mark.parametrize("unscales", [False, True])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_the_largest_change_is_found_whether_or_not_the_loop_unscales(bad: int, unscales: bool) -> None:
    """A spike's micro-batch, in gradients that lie there times 1,024 until `unscale_`."""
    model = make_model()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    guard = StepGuard(model, optimizer, spike_warmup=8, spike_window=16, spike="skip")
    scaler: Any = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(24):
        for index in range(3):
            loss = _loss(model, step % 3, index) * (1e3 if (step, index) == (20, bad) else 1.0)
            scaler.scale(loss).backward()
            guard.accumulate(loss)
        if unscales:
            scaler.unscale_(optimizer)
        guard.step(scaler=scaler)
        scaler.update()
        optimizer.zero_grad()
    (flagged,) = [record for record in guard.drain(wait=True) if record.skipped]
    assert (flagged.step, flagged.micro_batch) == (20, bad)


def test_a_loop_that_clips_beforehand_keeps_its_weights_and_is_guarded() -> None:
    guard, model, optimizer = _guarded(max_norm=1.0)
    twin = make_model()
    reference = OPTIMIZERS["adamw"](twin.parameters())
    for step in range(4):
        for one in (model, twin):
            loss = _loss(one, step, scale=10.0)
            loss.backward()
            if one is model and step == 2:
                one[0].bias.grad[0] = math.nan
            nn.utils.clip_grad_norm_(one.parameters(), 1.0)
        guard.step(loss.detach())
        if step != 2:
            reference.step()
        optimizer.zero_grad()
        reference.zero_grad()
    assert worst_difference(snapshot(model, optimizer), snapshot(twin, reference)) == ""
    assert [record.skipped for record in guard.drain(wait=True)] == [False, False, True, False]
