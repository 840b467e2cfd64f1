"""What of the guard only a GPU can show: that it never waits for the device, and decides as on the CPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from harness.config import OptimConfig
from harness.records import StepRecord
from harness.stability import StepGuard
from harness.training.optim import build_optimizers
from tests.support.cuda import no_synchronisation
from tests.support.guarded import OPTIMIZERS, batch, make_model, snapshot, worst_difference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


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
        if step < 2 or device == "cpu":  # state, index tables and graphs are made in the first steps
            guard.step(loss)
        else:
            with no_synchronisation():
                guard.step(loss)
        optimizer.zero_grad()
    return guard.drain(wait=True), model


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_a_step_never_waits_for_the_device_and_decides_as_on_the_cpu(name: str) -> None:
    (ours, model), (theirs, twin) = (_train(device, name, bad_step=3) for device in ("cuda", "cpu"))
    for one, other in zip(ours, theirs, strict=True):
        assert (one.verdict, one.rank, one.parameter) == (other.verdict, other.rank, other.parameter)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
    for mine, reference in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.cpu(), reference, rtol=1e-3, atol=1e-4)


def test_buffers_are_brought_back_without_waiting_for_the_device() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)).cuda()
    model.register_buffer("mask", torch.zeros(1 << 20, device="cuda"))
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    guard = StepGuard(model, optimizer)
    before: dict[str, torch.Tensor] = {}
    for step in range(20):
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        inputs, targets = (tensor.cuda() for tensor in batch(step))
        loss = nn.functional.mse_loss(model(inputs * math.nan if step == 19 else inputs), targets)
        loss.backward()
        if step < 2:
            guard.step(loss)
        else:
            with no_synchronisation():
                guard.step(loss)
        optimizer.zero_grad()
    assert [record.skipped for record in guard.drain(wait=True)] == [False] * 19 + [True]
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "adagrad"])
def test_every_optimizer_of_the_configuration_can_be_guarded(name: Any) -> None:
    model = make_model().cuda()
    guard = StepGuard(model, [*build_optimizers(model, OptimConfig(name=name), is_sharded=False).values()])
    for step in range(3):
        inputs, targets = (tensor.cuda() for tensor in batch(step))
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        guard.step(loss)
    assert [record.verdict in ("apply", "clip") for record in guard.drain(wait=True)] == [True] * 3


def test_a_graph_gives_the_bits_of_its_kernels_and_goes_on_after_a_checkpoint() -> None:
    """Ninety steps with spikes, NaN and a reload on the way, against a guard that records nothing."""
    norms: list[list[tuple[float, ...]]] = []
    for graphs in (True, False):
        torch.manual_seed(0)
        model = make_model().cuda()
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        guard = StepGuard(model, optimizer, spike="skip", spike_warmup=20, max_norm=0.5)
        seen = []
        for step in range(90):
            decider = guard._device._decider
            for call in (decider._rank_statistics, decider._decision):
                call._refused = not graphs
            inputs, targets = (tensor.cuda() for tensor in batch(step % 7))
            loss = nn.functional.mse_loss(model(inputs), targets) * (1000.0 if step in (40, 41, 70) else 1.0)
            loss.backward()
            if step in (50, 60):
                model[2].weight.grad[0, 0] = math.nan
            guard.step(loss)
            optimizer.zero_grad()
            seen += guard.drain(wait=step == 54)
            if step == 54:  # as a checkpoint gives it: in host memory
                rule = {name: value.cpu() for name, value in guard.state_dict()["spike_rule"].items()}
                guard.load_state_dict({**guard.state_dict(), "spike_rule": rule})
        seen += guard.drain(wait=True)
        assert (decider._decision._recording is not None) == graphs
        norms.append([(r.step, r.loss, r.grad_norm, r.clip_coef, r.spike_score, r.verdict) for r in seen])
    assert len(norms[0]) == 90
    assert str(norms[0]) == str(norms[1])
    assert [n[0] for n in norms[0] if n[-1] == "skip"] == [40, 41, 50, 60, 70]


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
