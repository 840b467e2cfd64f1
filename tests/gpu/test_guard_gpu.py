"""What of the guard only a GPU can show: that it never waits for the device, and decides as on the CPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from harness.records import StepRecord
from harness.stability import StepGuard
from tests.support.guarded import OPTIMIZERS, batch, make_model, snapshot, worst_difference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@contextmanager
def _no_synchronisation() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _train(device: str, name: str, *, bad_step: int) -> tuple[list[StepRecord], nn.Module]:
    model = make_model().to(device)
    optimizer = OPTIMIZERS[name](model.parameters())
    guard = StepGuard(model, optimizer, per_parameter_every=1, sample_every=1, spike="skip")
    for step in range(6):
        inputs, targets = (tensor.to(device) for tensor in batch(step))
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        if step == bad_step:
            model[2].weight.grad[0, 0] = math.nan
        if step < 2 or device == "cpu":  # state and index tables are made in the first steps
            guard.step(loss)
        else:
            with _no_synchronisation():
                guard.step(loss)
        optimizer.zero_grad()
    return guard.drain(wait=True), model


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "adagrad"])
def test_a_step_never_waits_for_the_device_and_decides_as_on_the_cpu(name: str) -> None:
    (ours, model), (theirs, twin) = (_train(device, name, bad_step=3) for device in ("cuda", "cpu"))
    for one, other in zip(ours, theirs, strict=True):
        assert (one.verdict, one.rank, one.parameter) == (other.verdict, other.rank, other.parameter)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
    for mine, reference in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.cpu(), reference, rtol=1e-3, atol=1e-4)


def test_a_skipped_step_keeps_every_bit() -> None:
    model = make_model().cuda()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    guard = StepGuard(model, optimizer)
    for step in range(2):
        inputs, targets = (tensor.cuda() for tensor in batch(step))
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        before = snapshot(model, optimizer)
        if step == 1:
            model[0].bias.grad.fill_(math.inf)
        guard.step(loss)
        optimizer.zero_grad()
    assert worst_difference(before, snapshot(model, optimizer)) == ""
