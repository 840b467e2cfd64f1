"""What FSDP2 offers beside a plain forward and backward pass is measured right too, or refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard
from torch.utils.checkpoint import checkpoint

from harness.errors import ConfigError
from harness.records import StepRecord
from harness.stability import StepGuard
from tests.support.distributed import run_ranks
from tests.support.guarded import OPTIMIZERS, batch


class _Model(nn.Module):
    """A block, used `calls` times, between two layers; its branch `unused` is never used."""

    def __init__(self, *, calls: int = 1, recompute: bool = False) -> None:
        super().__init__()
        self.calls, self.recompute = calls, recompute
        self.first, self.block, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.unused = nn.Linear(2, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(inputs))
        for _ in range(self.calls):
            hidden = (
                checkpoint(self.block, hidden, use_reentrant=False) if self.recompute else self.block(hidden)
            )
        return self.head(torch.tanh(hidden))

    def training_step(self, inputs: Tensor) -> Tensor:
        return self.forward(inputs).square().mean()


def _shard(model: nn.Module, **options: Any) -> Any:
    fully_shard(model.block, **options)
    return fully_shard(model, **options)


def _call(model: nn.Module, inputs: Tensor) -> Tensor:
    return model(inputs).square().mean()


Step = Callable[[Any, Tensor], Tensor]


def _by_method(model: Any) -> tuple[Any, Step]:
    sharded = _shard(model)
    register_fsdp_forward_method(sharded, "training_step")
    return sharded, lambda model, inputs: model.training_step(inputs)


def _gathered_by_hand(model: Any) -> tuple[Any, Step]:
    def step(model: Any, inputs: Tensor) -> Tensor:
        model.unshard()
        model.block.unshard()
        return _call(model, inputs)

    return _shard(model), step


def _kept_gathered(model: Any) -> tuple[Any, Step]:
    sharded = _shard(model, reshard_after_forward=False)
    sharded.set_reshard_after_backward(False)
    return sharded, _call


def _unused_too(model: Any) -> tuple[Any, Step]:
    sharded = _shard(model)
    if hasattr(sharded, "set_reduce_scatter_unused_params"):  # from torch 2.12 on
        sharded.set_reduce_scatter_unused_params(True)
    return sharded, _call


def _divided(model: Any) -> tuple[Any, Step]:
    sharded = _shard(model, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float64))
    for module in (sharded, sharded.block):
        module.set_gradient_divide_factor(8.0)
    return sharded, _call


def _by_columns(model: Any) -> tuple[Any, Step]:
    return _shard(
        model, shard_placement_fn=lambda p: Shard(1) if p.shape in {(6, 6), (6, 4)} else Shard(0)
    ), _call


FEATURES: dict[str, Callable[[Any], tuple[Any, Step]]] = {
    "register_fsdp_forward_method": _by_method,
    "unshard by hand": _gathered_by_hand,
    "never resharded": _kept_gathered,
    "unused parameters reduced": _unused_too,
    "gradient divide factor": _divided,
    "sharded by columns": _by_columns,
    "frozen and ignored": lambda model: (
        _shard(model, ignored_params={model.unused.weight, model.unused.bias}),
        _call,
    ),
}


def _local_gradients(model: nn.Module, rank: int, micro_batches: range = range(1)) -> dict[str, Tensor]:
    for micro_batch in micro_batches:
        _call(model, batch(0, rank, micro_batch)[0]).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _measured(model: Any, step: Step, rank: int) -> StepRecord:
    parameters = [p for p in model.parameters() if p.requires_grad]
    guard = StepGuard(model, OPTIMIZERS["adamw"](parameters), per_parameter_every=1, lag_steps=0)
    loss = step(model, batch(0, rank)[0])
    loss.backward()
    guard.step(loss)
    (record,) = guard.drain()
    guard.close()
    return record


def _check(record: StepRecord, gradients: list[dict[str, Tensor]], what: str) -> None:
    """`gradients`: each rank's own."""
    assert not record.skipped, (what, record.reason)
    for row, own in zip(record.per_rank, gradients, strict=True):
        norm = math.hypot(*(float(g.norm()) for g in own.values()))
        assert row.grad_norm == pytest.approx(norm, rel=1e-5), what
    for name in gradients[0]:
        row = record.per_parameter[name]
        assert row.max_abs == pytest.approx(
            max(float(own[name].abs().max()) for own in gradients), rel=1e-5
        ), what
        assert row.num_zero == 0, what


def _compare(rank: int, world_size: int) -> None:
    for what, build in FEATURES.items():
        torch.manual_seed(0)
        plain = _Model()
        if what == "frozen and ignored":
            plain.unused.requires_grad_(False)
        gradients = [_local_gradients(copy.deepcopy(plain), other) for other in range(world_size)]
        _check(_measured(*build(plain), rank), gradients, what)
    torch.manual_seed(0)
    plain = _Model(recompute=True)
    gradients = [_local_gradients(copy.deepcopy(plain), other) for other in range(world_size)]
    _check(_measured(_shard(plain), _call, rank), gradients, "recomputed")


def test_rows_are_those_of_each_ranks_own_gradient_whatever_feature_is_used() -> None:
    run_ranks(_compare, 2)


def _in_pieces(rank: int, world_size: int, mesh_shape: tuple[int, ...]) -> list[StepRecord]:
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard")[-len(mesh_shape) :])
    model = _shard(_Model(calls=2), mesh=mesh)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    guard = StepGuard(model, optimizer, lag_steps=0)
    for step in range(2):
        for micro_batch in range(2):
            if len(mesh_shape) == 2:
                model.set_requires_all_reduce(micro_batch == 1)
            inputs = batch(step, rank, micro_batch)[0]
            loss = _call(model, inputs * math.nan if (step, micro_batch, rank) == (1, 0, 1) else inputs)
            loss.backward()
            guard.accumulate(torch.zeros(()), is_last=micro_batch == 1)  # the loss does not give it away
        guard.step()
        optimizer.zero_grad()
    return guard.drain(wait=True)


def _check_pieces(rank: int, world_size: int, mesh_shape: tuple[int, ...]) -> None:
    good, bad = _in_pieces(rank, world_size, mesh_shape)
    assert not good.skipped
    assert (bad.verdict, bad.rank, bad.micro_batch) == ("skip", 1, 0)


def test_a_nan_in_an_earlier_piece_of_the_gradient_is_blamed_on_its_rank() -> None:
    run_ranks(_check_pieces, 2, (2,))
    run_ranks(_check_pieces, 4, (2, 2))


def _refused(rank: int, world_size: int) -> None:
    model = _shard(_Model())
    model.set_all_reduce_hook(lambda gradient: None)
    with pytest.raises(ConfigError, match="set_all_reduce_hook"):
        StepGuard(model, OPTIMIZERS["adamw"](model.parameters()))
    model = _shard(_Model())
    inner = model._get_fsdp_state()._fsdp_param_group._reduce_scatter_comm
    guard = StepGuard(model, OPTIMIZERS["adamw"](model.parameters()))
    model.set_custom_reduce_scatter(inner)
    loss = _call(model, batch(0, rank)[0])
    loss.backward()
    with pytest.raises(ConfigError, match="reduce-scatter is a"):
        guard.step(loss)


def _not_reduced(rank: int, world_size: int) -> list[StepRecord]:
    _refused(rank, world_size)
    model = _shard(_Model())
    guard = StepGuard(model, OPTIMIZERS["adamw"](model.parameters()), lag_steps=0)
    for micro_batch in range(2):
        model.set_requires_gradient_sync(micro_batch == 0)
        loss = _call(model, batch(0, rank, micro_batch)[0])
        loss.backward()
        guard.accumulate(loss)
    guard.step()
    return guard.drain()


def test_a_gradient_that_was_not_reduced_or_cannot_be_seen_is_not_applied() -> None:
    (record,), _ = run_ranks(_not_reduced, 2)
    assert record.verdict == "skip"
    assert "were not reduced" in str(record.reason)
