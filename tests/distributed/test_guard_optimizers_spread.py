"""Parts of a model, several guards, thawed layers and other people's scalers under DDP and FSDP2."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer

from harness.errors import ConfigError
from harness.stability import StepGuard
from tests.support.distributed import run_ranks
from tests.support.guarded import OPTIMIZERS, batch, make_model, snapshot, worst_difference


def _loss(model: nn.Module, step: int, rank: int, micro_batch: int = 0) -> Tensor:
    inputs, targets = batch(step, rank, micro_batch)
    return nn.functional.mse_loss(model(inputs), targets)


def _spread(how: str, model: nn.Module) -> nn.Module:
    if how == "ddp":
        return DistributedDataParallel(model, bucket_cap_mb=0.0002)
    for module in model.children():
        if list(module.parameters()):
            fully_shard(module)
    return fully_shard(model)


def _norm(parameters: Any) -> float:
    total = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return float(total.full_tensor() if hasattr(total, "full_tensor") else total)


def _probe(rank: int, world_size: int, how: str) -> None:
    """The optimizer holds the head; the backbone takes gradients that nobody clears."""
    model = _spread(how, make_model())
    head = getattr(model, "module", model)[4]
    optimizer = OPTIMIZERS["adamw"](head.parameters())
    guard = StepGuard(model, optimizer, max_norm=None, per_parameter_every=1)
    for step in range(3):
        loss = _backward(model, step, rank)
        expected = _norm(head.parameters())
        guard.step(loss)
        (record,) = guard.drain(wait=True)
        assert list(record.per_parameter) == ["4.weight", "4.bias"]
        assert (record.verdict, record.grad_norm) == ("apply", pytest.approx(expected, rel=1e-6))
        optimizer.zero_grad()


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_only_what_the_optimizer_holds_is_measured(how: str) -> None:
    run_ranks(_probe, 2, how)


def _two_guards(rank: int, world_size: int, how: str) -> None:
    model = _spread(how, make_model())
    layers = getattr(model, "module", model)
    parts = {"body": [*layers[0].parameters(), *layers[2].parameters()], "head": [*layers[4].parameters()]}
    optimizers = {name: AdamW(held, lr=1e-2, fused=True) for name, held in parts.items()}
    guards = {name: StepGuard(model, optimizers[name], max_norm=0.05) for name in parts}
    for step in range(3):
        loss = _loss(model, step, rank)
        loss.backward()
        expected = {name: _norm(held) for name, held in parts.items()}
        for name, guard in guards.items():
            guard.step(loss)
            (record,) = guard.drain(wait=True)
            assert record.verdict == "clip", record
            assert record.grad_norm == pytest.approx(expected[name], rel=1e-5)
            assert [row.num_nan for row in record.per_rank] == [0, 0]
        model.zero_grad()


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_guards_of_one_model_see_each_its_part(how: str) -> None:
    run_ranks(_two_guards, 2, how)


def _thaw_under_ddp(rank: int, world_size: int) -> None:
    inner = make_model()
    inner[0].requires_grad_(False)
    model = DistributedDataParallel(inner)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    guard = StepGuard(model, optimizer)
    guard.step(_backward(model, 0, rank))
    optimizer.zero_grad()
    inner[0].requires_grad_(True)
    loss = _backward(model, 1, rank)
    before = snapshot(model, optimizer)
    with pytest.raises(ConfigError, match=r"gradients of 0\.weight, 0\.bias are not reduced"):
        guard.step(loss)
    assert worst_difference(before, snapshot(model, optimizer)) == ""


def _backward(model: nn.Module, step: int, rank: int) -> Tensor:
    loss = _loss(model, step, rank)
    loss.backward()
    return loss


def test_what_ddp_does_not_reduce_is_refused_on_all_ranks_before_it_is_applied() -> None:
    run_ranks(_thaw_under_ddp, 2)


def _thaw_under_fsdp(rank: int, world_size: int, frozen: str) -> None:
    inner = make_model()
    _freeze(inner, frozen)
    model = _spread("fsdp", inner)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    guard = StepGuard(model, optimizer, max_norm=None, per_parameter_every=1)
    for step in range(4):
        if step == 2:
            _freeze(model, frozen, False)
        weights = {name: p.full_tensor().clone() for name, p in model.state_dict().items()}
        loss = _backward(model, step, rank)
        expected = {n: _norm([p]) for n, p in model.named_parameters() if p.grad is not None}
        guard.step(loss)
        (record,) = guard.drain(wait=True)
        assert record.verdict == "apply"
        rows = {name: row.grad_norm for name, row in record.per_parameter.items()}
        assert rows == pytest.approx(expected, rel=1e-5)
        assert len(rows) == 6 - len(_frozen(inner, frozen)) * (step < 2)
        # The rank's own gradient, whole and before the reduction, against that of a copy that is not sharded.
        copy = make_model()
        copy.load_state_dict(weights)
        _freeze(copy, frozen, step < 2)
        _backward(copy, step, rank)
        assert record.per_rank[rank].grad_norm == pytest.approx(_norm(copy.parameters()), rel=1e-4)
        optimizer.zero_grad()


def _frozen(model: nn.Module, start: str) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if name.startswith(start)]


def _freeze(model: nn.Module, start: str, on: bool = True) -> None:
    for p in _frozen(model, start):
        p.requires_grad_(not on)


@pytest.mark.parametrize("frozen", ["0", "4", "2.weight", "0.bias"])
def test_a_layer_thawed_under_fsdp_is_measured_from_that_step_on(frozen: str) -> None:
    run_ranks(_thaw_under_fsdp, 2, frozen)


def _with_scaler(rank: int, world_size: int, how: str, unscales: bool) -> None:
    """The loop keeps its GradScaler: the same norms, clips and weights as without a scale."""
    wrap = (lambda m: m) if how == "plain" else (lambda m: _spread(how, m))
    ours, theirs = wrap(make_model()), wrap(make_model())
    optimizer, reference = (SGD(m.parameters(), lr=0.1, fused=how != "fsdp") for m in (ours, theirs))
    # A power of two: it rounds nothing.
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    guard = StepGuard(ours, optimizer, max_norm=0.1)
    twin = StepGuard(theirs, reference, max_norm=0.1)
    scales = []
    for step in range(6):
        loss = _loss(ours, step, rank)
        scaler.scale(loss).backward()
        if unscales:
            scaler.unscale_(optimizer)
        if step == 3:  # an overflow of the scaled gradient
            next(ours.parameters()).grad.mul_(math.inf)
        guard.step(loss, scaler=scaler)
        scaler.update()
        scales.append(scaler.get_scale())
        optimizer.zero_grad()
        if step != 3:
            twin.step(_backward(theirs, step, rank), scaler=None)
            reference.zero_grad()
    records, others = guard.drain(wait=True), twin.drain(wait=True)
    assert [r.verdict for r in records] == ["clip", "clip", "clip", "skip", "clip", "clip"]
    if how == "plain":
        assert scales == [1024, 2048, 2048, 1024, 1024, 2048]
    applied = [r for r in records if r.verdict == "clip"]
    for record, other in zip(applied, others, strict=True):
        assert record.grad_norm == pytest.approx(other.grad_norm, rel=1e-5)
        assert record.per_rank[rank].grad_norm == pytest.approx(other.per_rank[rank].grad_norm, rel=1e-5)
    difference = worst_difference(snapshot(ours, optimizer), snapshot(theirs, reference))
    assert difference == "" or how == "fsdp"


@pytest.mark.parametrize("unscales", [False, True])
@pytest.mark.parametrize("how", ["plain", "ddp"])
def test_the_loops_own_grad_scaler_is_taken_out_of_gradients_and_kept_up_to_date(
    how: str, unscales: bool
) -> None:
    run_ranks(_with_scaler, 1 if how == "plain" else 2, how, unscales)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_the_loops_own_grad_scaler_on_one_rank_and_on_shards(how: str) -> None:
    run_ranks(_with_scaler, 1 if how == "ddp" else 2, how, how == "ddp")


def _unscaled_overflows(rank: int, world_size: int) -> None:
    """An overflow is one for the ladder and `nonfinite: stop`, whether the loop has unscaled or not."""
    model = make_model()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    guard = StepGuard(model, optimizer, nonfinite="stop")
    for step in range(3):
        loss = _loss(model, step, 0)
        scaler.scale(loss).backward()
        model[0].weight.grad.mul_(math.inf)
        scaler.unscale_(optimizer)
        guard.step(loss, scaler=scaler)
        scaler.update()
        optimizer.zero_grad()
    found = [(r.verdict, r.loss_scale) for r in guard.drain(wait=True)]
    assert found == [("skip", 4.0), ("skip", 2.0), ("stop", 1.0)]
    scaler.scale(_loss(model, 3, 0)).backward()
    guard.step(loss, scaler=scaler)
    with pytest.raises(ConfigError, match=r"Call scaler\.update\(\)"):
        guard.step(loss, scaler=scaler)


def test_an_overflow_is_one_also_after_unscale_and_a_missing_update_is_found() -> None:
    run_ranks(_unscaled_overflows, 1)


def _discarded(rank: int, world_size: int) -> None:
    """A backward pass whose gradients the loop threw away says nothing about the next step."""
    model = _spread("fsdp", make_model())
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    guard = StepGuard(model, optimizer)
    (_loss(model, 0, rank) * math.nan).backward()
    optimizer.zero_grad()
    guard.step(_backward(model, 1, rank))
    (record,) = guard.drain(wait=True)
    assert (record.verdict, record.num_nan, record.reason) == ("clip", 0, None)


def test_gradients_that_were_thrown_away_under_fsdp_are_forgotten() -> None:
    run_ranks(_discarded, 2)


def _forgotten_scaler(rank: int, world_size: int) -> None:
    model = make_model()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ConfigError, match="has scaled no loss yet"):
        StepGuard(model, optimizer).step(_backward(model, 0, 0), scaler=scaler)
    loss = _loss(model, 0, 0)
    scaler.scale(loss).backward()
    before = snapshot(model, optimizer)
    with pytest.raises(ConfigError, match=r"guard\.step\(loss, scaler=scaler\)"):
        StepGuard(model, optimizer).step(loss)
    with pytest.raises(ConfigError, match="one of the two scales the loss"):
        StepGuard(model, optimizer, precision=torch.float16).step(loss, scaler=scaler)
    assert worst_difference(before, snapshot(model, optimizer)) == ""
    refused = StepGuard(model, optimizer)
    with pytest.raises(ConfigError, match="scaler=None"):
        refused.step(loss)
    refused.step(loss, scaler=None)  # what the error says, on the same guard
    assert refused.drain(wait=True)[0].loss_scale == 1.0
    guard = StepGuard(model, optimizer)
    switched_off = torch.amp.GradScaler("cpu", enabled=False)
    loss = _loss(model, 1, 0)
    switched_off.scale(loss).backward()
    guard.step(loss, scaler=switched_off)
    assert guard.drain(wait=True)[0].loss_scale == 1.0
    del scaler  # else it is the one that is found
    unasked = StepGuard(model, optimizer)  # as a loop in bf16 has it, with `enabled=dtype == "float16"`
    unasked.step(_backward(model, 2, 0))
    assert unasked.drain(wait=True)[0].loss_scale == 1.0


def test_a_scaler_that_was_not_handed_over_is_found() -> None:
    run_ranks(_forgotten_scaler, 1)


def _under_accelerate(rank: int, world_size: int) -> None:
    """accelerate's own loop, guarded and not: an optimizer step per two micro-batches, the same weights."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
    )  # asked for, though the group is there already
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    ours, theirs = make_model(), make_model()
    mine, optimizer = accelerator.prepare(ours, SGD(ours.parameters(), lr=0.1, fused=True))
    other, reference = accelerator.prepare(theirs, SGD(theirs.parameters(), lr=0.1, fused=True))
    guard = StepGuard(mine, optimizer, max_norm=0.1)
    for step in range(6):
        with accelerator.accumulate(mine, other):
            loss = _loss(mine, step, rank)
            accelerator.backward(loss)
            accelerator.backward(_loss(other, step, rank))
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(other.parameters(), 0.1)
            guard.step(loss)
            reference.step()
            optimizer.zero_grad()
            reference.zero_grad()
    records = guard.drain(wait=True)
    assert [(r.step, r.verdict) for r in records] == [(0, "clip"), (1, "clip"), (2, "clip")]
    assert records[-1].grad_norm == pytest.approx(float(norm), rel=1e-5)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("world_size", [1, 2])
def test_accelerates_accumulation_is_respected(world_size: int) -> None:
    run_ranks(_under_accelerate, world_size)


def _scaled_by_accelerate(rank: int, world_size: int) -> None:
    """In fp16 accelerate keeps the scaler in its wrapper, and its step is unscale, step and update."""
    Accelerator(cpu=True)
    model = make_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    optimizer = AcceleratedOptimizer(SGD(model.parameters(), lr=0.1, fused=True), scaler=scaler)
    guard = StepGuard(model, optimizer, max_norm=0.1)
    scales = []
    for step in range(4):
        loss = _loss(model, step, rank)
        scaler.scale(loss).backward()
        expected = _norm(model.parameters()) / scaler.get_scale()
        if step == 3:
            model[0].weight.grad.mul_(math.inf)
        guard.step(loss)
        scales.append(scaler.get_scale())
        (record,) = guard.drain(wait=True)
        if step < 3:
            assert (record.verdict, record.grad_norm) == ("clip", pytest.approx(expected, rel=1e-6))
        optimizer.zero_grad()
    assert record.verdict == "skip"
    assert scales == [1024, 2048, 2048, 1024]


def test_accelerates_scaler_is_updated_as_its_own_step_would() -> None:
    run_ranks(_scaled_by_accelerate, 1)


def _partitioned(model: nn.Module) -> Optimizer:
    return ZeroRedundancyOptimizer(model.parameters(), optimizer_class=AdamW, lr=1e-2)


def _averaging(model: nn.Module) -> Optimizer:
    averager = PeriodicModelAverager(period=1, warmup_steps=0)
    return PostLocalSGDOptimizer(AdamW(model.parameters(), lr=1e-2, fused=True), averager)


def _with_a_collective(rank: int, world_size: int, how: str) -> None:
    """An optimizer whose step is a collective: called on all ranks or on none, and as a whole."""
    model = DistributedDataParallel(make_model())
    optimizer = {"partitioned": _partitioned, "averaging": _averaging}[how](model)
    guard = StepGuard(model, optimizer)
    for step in range(3):
        loss = _backward(model, step, rank)
        before = [p.detach().clone() for p in model.parameters()]
        guard.step(loss * (math.nan if (step, rank) == (1, 1) else 1.0))
        (record,) = guard.drain(wait=True)
        same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert (record.verdict == "skip") == same == (step == 1)
        optimizer.zero_grad()
    if isinstance(optimizer, PostLocalSGDOptimizer):
        assert optimizer.averager.step == 2


@pytest.mark.parametrize("how", ["partitioned", "averaging"])
def test_an_optimizer_with_a_collective_in_its_step_skips_on_all_ranks(how: str) -> None:
    run_ranks(_with_a_collective, 2, how)
