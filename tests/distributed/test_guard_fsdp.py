"""The guard under FSDP2 and HSDP: the same bits as without it, whole local gradients, the culprit's rank."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

from harness.dist import gradient_sync
from harness.errors import ConfigError
from harness.records import StepRecord
from harness.stability import StepGuard
from tests.support.distributed import run_ranks
from tests.support.guarded import OPTIMIZERS, batch, make_model, snapshot, worst_difference


def _sharded(mesh_shape: tuple[int, ...], model: nn.Module | None = None, **options: Any) -> nn.Module:
    names = ("replicate", "shard")[-len(mesh_shape) :]
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    model = make_model(width=7) if model is None else model
    for module in model.children():
        if list(module.parameters()):
            fully_shard(module, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def _backward(model: nn.Module, step: int, rank: int, micro_batch: int = 0) -> Tensor:
    inputs, targets = batch(step, rank, micro_batch)
    loss = nn.functional.mse_loss(model(inputs), targets)
    loss.backward()
    return loss


def _local_gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.to_local().clone() for p in model.parameters() if p.grad is not None]


def _compare_gradients(rank: int, world_size: int, mesh_shape: tuple[int, ...]) -> None:
    for policy in (MixedPrecisionPolicy(), MixedPrecisionPolicy(param_dtype=torch.bfloat16)):
        bare, guarded = (_sharded(mesh_shape, mp_policy=policy) for _ in range(2))
        guard = StepGuard(guarded, OPTIMIZERS["adamw"](guarded.parameters()))
        for step in range(2):
            for micro_batch in range(2):
                for model in (bare, guarded):
                    with gradient_sync(model, on=micro_batch == 1):
                        loss = _backward(model, step, rank, micro_batch)
                guard.accumulate(loss)
            want, have = _local_gradients(bare), _local_gradients(guarded)
            assert len(want) == len(have) == 6
            assert all(torch.equal(w, h) for w, h in zip(want, have, strict=True))
            guard.step()
            for model in (bare, guarded):
                model.zero_grad()
                model.load_state_dict(bare.state_dict())


@pytest.mark.parametrize("mesh_shape", [(2,), (3,), (2, 2)])
def test_shards_of_gradients_are_bitwise_those_without_the_guard(mesh_shape: tuple[int, ...]) -> None:
    run_ranks(_compare_gradients, math.prod(mesh_shape), mesh_shape)


def _measured(rank: int, world_size: int, mesh_shape: tuple[int, ...]) -> tuple[StepRecord, Any]:
    model = _sharded(mesh_shape)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    guard = StepGuard(model, optimizer, max_norm=0.05, per_parameter_every=1, lag_steps=0)
    own = make_model(width=7)
    for micro_batch in range(2):
        with gradient_sync(model, on=micro_batch == 1):
            guard.accumulate(_backward(model, 0, rank, micro_batch))
        _backward(own, 0, rank, micro_batch)
    guard.step()
    (record,) = guard.drain()
    gradients = {name: p.grad for name, p in own.named_parameters()}
    return record, {name: (g.norm().item(), g.abs().max().item(), g) for name, g in gradients.items()}


@pytest.mark.parametrize("mesh_shape", [(1,), (2,), (2, 2)])
def test_a_record_is_that_of_the_whole_gradients(mesh_shape: tuple[int, ...]) -> None:
    results = run_ranks(_measured, math.prod(mesh_shape), mesh_shape)
    record = results[0][0]
    assert all(other == record for other, _ in results)
    ranks = [own for _, own in results]
    norms = [math.hypot(*(norm for norm, _, _ in own.values())) for own in ranks]
    assert [row.grad_norm for row in record.per_rank] == pytest.approx(norms, rel=1e-5)
    for name in ranks[0]:
        row = record.per_parameter[name]
        mean = torch.stack([own[name][2] for own in ranks]).mean(0)
        assert row.grad_norm == pytest.approx(mean.norm().item(), rel=1e-5)
        assert row.max_abs == pytest.approx(max(own[name][1] for own in ranks), rel=1e-5)
        assert row.num_zero == 0
        assert row.num_elements == mean.numel()
    assert record.verdict == "clip"
    squares = sum(row.grad_norm**2 for row in record.per_parameter.values())
    assert record.grad_norm == pytest.approx(math.sqrt(squares))


def _train(
    rank: int, world_size: int, mesh_shape: tuple[int, ...], culprit: int, bad: int
) -> list[StepRecord]:
    model, twin = _sharded(mesh_shape), _sharded(mesh_shape)
    optimizer, reference = (OPTIMIZERS["adamw"](m.parameters()) for m in (model, twin))
    guard, twin_guard = StepGuard(model, optimizer), StepGuard(twin, reference)
    for step in range(3):
        for micro_batch in range(3):
            handles: list[Any] = []
            if (step, rank, micro_batch) == (1, culprit, bad):

                def poison(module: nn.Module, args: object, handles: list[Any] = handles) -> None:
                    handles.append(module.weight.register_hook(lambda g: g * math.nan))

                handles.append(model[2].register_forward_pre_hook(poison))
            with gradient_sync(model, on=micro_batch == 2):
                guard.accumulate(_backward(model, step, rank, micro_batch))
            for handle in handles:
                handle.remove()
            if step != 1:
                with gradient_sync(twin, on=micro_batch == 2):
                    twin_guard.accumulate(_backward(twin, step, rank, micro_batch))
        guard.step()
        optimizer.zero_grad()
        if step != 1:
            twin_guard.step()
            reference.zero_grad()
    assert worst_difference(snapshot(model, optimizer), snapshot(twin, reference)) == ""
    guard.flush()
    return guard.drain()


@pytest.mark.parametrize(("mesh_shape", "culprit", "bad"), [((2,), 1, 1), ((2, 2), 3, 2)])
def test_one_ranks_nan_is_skipped_by_all_and_blamed_on_it(
    mesh_shape: tuple[int, ...], culprit: int, bad: int
) -> None:
    first, *others = run_ranks(_train, math.prod(mesh_shape), mesh_shape, culprit, bad)
    assert all(other == first for other in others)
    assert [r.verdict == "skip" for r in first] == [False, True, False]
    assert (first[1].rank, first[1].parameter, first[1].micro_batch) == (culprit, "2.weight", bad)
    assert first[1].num_nan == 49
    assert first[1].per_parameter["2.weight"].num_nan == 49


class _Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.frozen = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)
        self.frozen.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.used(inputs) + self.frozen(inputs)


def _unused(rank: int, world_size: int) -> list[StepRecord]:
    torch.manual_seed(0)
    # One parameter group for all, so that a buffer holds only some of its parameters.
    model = fully_shard(_Branches())
    optimizer = OPTIMIZERS["adamw"](p for p in model.parameters() if p.requires_grad)
    guard = StepGuard(model, optimizer, per_parameter_every=1)
    for step in range(2):
        loss = model(batch(step, rank)[0]).square().mean()
        loss.backward()
        guard.step(loss)
        optimizer.zero_grad()
    return guard.drain(wait=True)


def test_unused_and_frozen_parameters_do_not_shift_the_rows() -> None:
    records, other = run_ranks(_unused, 2)
    assert records == other
    rows = records[1].per_parameter
    assert list(rows) == ["used.weight", "used.bias", "unused.weight", "unused.bias"]
    assert rows["used.weight"].grad_norm > 0
    assert rows["used.weight"].max_abs > 0
    assert (rows["unused.weight"].grad_norm, rows["unused.weight"].max_abs) == (0, 0)


def _half_precision(rank: int, world_size: int) -> StepRecord:
    policy = MixedPrecisionPolicy(param_dtype=torch.float16, output_dtype=torch.float32)
    model = _sharded((world_size,), mp_policy=policy)
    guard = StepGuard(
        model, OPTIMIZERS["adamw"](model.parameters()), precision=torch.float16, init_loss_scale=8.0
    )
    inputs, targets = batch(0, rank)
    loss = nn.functional.mse_loss(model(inputs), targets)
    guard.scale(loss).backward()
    guard.step(loss)
    (record,) = guard.drain(wait=True)
    return record


def test_fp16_gradients_are_reported_as_they_were_before_fsdp_divides_them() -> None:
    record = run_ranks(_half_precision, 4)[0]
    for rank, row in enumerate(record.per_rank):
        own = make_model(width=7)
        _backward(own, 0, rank)
        norm = nn.utils.get_total_norm([p.grad for p in own.parameters() if p.grad is not None])
        assert row.grad_norm == pytest.approx(norm.item(), rel=2e-2)


def _refused(rank: int, world_size: int) -> None:
    partly = make_model()
    fully_shard(partly[0])
    fully_shard(partly, ignored_params={partly[4].weight})
    with pytest.raises(ConfigError, match="not at all"):
        StepGuard(partly, OPTIMIZERS["adamw"](partly.parameters()))
    single = _sharded((world_size, 1))
    with pytest.raises(ConfigError, match="single shard"):
        StepGuard(single, OPTIMIZERS["adamw"](single.parameters()))
    offloaded = _sharded((world_size,), offload_policy=CPUOffloadPolicy(pin_memory=False))
    with pytest.raises(ConfigError, match="CPUOffloadPolicy"):
        StepGuard(offloaded, OPTIMIZERS["adamw"](offloaded.parameters()))
    whole = _sharded((world_size,))
    with pytest.raises(ConfigError, match="only Adam and AdamW"):
        StepGuard(whole, OPTIMIZERS["sgd"](whole.parameters()))


def _closed(rank: int, world_size: int) -> None:
    model = _sharded((world_size,))
    inner = model[0]._get_fsdp_state()._fsdp_param_group._reduce_scatter_comm
    with StepGuard(model, OPTIMIZERS["adamw"](model.parameters())) as guard:
        guard.step(_backward(model, 0, rank))
    assert model[0]._get_fsdp_state()._fsdp_param_group._reduce_scatter_comm is inner
    _backward(model, 1, rank)


def test_meshes_that_cannot_be_measured_are_refused() -> None:
    run_ranks(_refused, 2)


def test_a_closed_guard_gives_the_reduce_scatter_back() -> None:
    run_ranks(_closed, 2)
