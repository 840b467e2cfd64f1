"""What DDP offers beside a plain forward and backward pass is measured right too, or refused in words."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from harness.errors import ConfigError
from harness.records import StepRecord
from harness.stability import StepGuard
from tests.support.distributed import run_ranks
from tests.support.guarded import OPTIMIZERS, batch, make_model


def _backward(model: nn.Module, step: int, rank: int) -> Tensor:
    inputs, targets = batch(step, rank)
    loss = nn.functional.mse_loss(model(inputs), targets)
    loss.backward()
    return loss


def _guard(model: nn.Module, **settings: Any) -> StepGuard:
    return StepGuard(model, OPTIMIZERS["adamw"](model.parameters()), **settings)


def _own_gradients(rank: int) -> list[Tensor]:
    model = make_model()
    _backward(model, 0, rank)
    return [p.grad for p in model.parameters() if p.grad is not None]


def _rows_of(rank: int, model: nn.Module, what: str) -> StepRecord:
    guard = _guard(model, lag_steps=0, per_parameter_every=1)
    guard.step(_backward(model, 0, rank))
    (record,) = guard.drain()
    assert not record.skipped, (what, record.reason)
    gradients = [_own_gradients(other) for other in range(2)]
    for row, own in zip(record.per_rank, gradients, strict=True):
        assert row.grad_norm == pytest.approx(math.hypot(*(float(g.norm()) for g in own)), rel=1e-5), what
    for index, row in enumerate(record.per_parameter.values()):
        largest = max(float(own[index].abs().max()) for own in gradients)
        assert row.max_abs == pytest.approx(largest, rel=1e-5), what
    return record


def _measured(rank: int, world_size: int) -> None:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    if rank < 2:
        model = DistributedDataParallel(make_model(), process_group=pairs[0], bucket_cap_mb=0.0002)
        _rows_of(rank, model, "some of the ranks")
        partly = make_model()
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(partly, ["2.weight"])
        model = DistributedDataParallel(partly, process_group=pairs[0])
        _rows_of(rank, model, "a parameter that is not reduced")


def test_rows_are_those_of_each_ranks_own_gradient_whatever_feature_is_used() -> None:
    run_ranks(_measured, 4)


def _train_until_one_runs_out(model: DistributedDataParallel, guard: StepGuard, rank: int) -> None:
    with model.join(throw_on_early_termination=True):
        for step in range(3 - rank):
            guard.step(_backward(model, step, rank))


def _refused(rank: int, world_size: int) -> None:
    def refuses(ddp: nn.Module, words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            _guard(ddp)

    model = make_model()
    delayed = {
        "delay_all_reduce_named_params": [("4.bias", model[4].bias)],
        "param_to_hook_all_reduce": model[0].weight,
    }
    refuses(DistributedDataParallel(model, **delayed), "delay_all_reduce_named_params")
    model = make_model()
    _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})
    refuses(DistributedDataParallel(model), "optimizer in the backward pass")
    model = DistributedDataParallel(make_model())
    guard = _guard(model)
    guard.step(_backward(model, 0, rank))
    with model.join(), pytest.raises(ConfigError, match=r"join\(\)"):
        guard.step(_backward(model, 1, rank))
    model = DistributedDataParallel(make_model())
    with model.join(enable=True):
        refuses(model, r"join\(\)")
    model = DistributedDataParallel(make_model())
    guard = _guard(model)
    with pytest.raises(RuntimeError, match="exhausted"):
        _train_until_one_runs_out(model, guard, rank)


def test_ways_past_the_buckets_and_uneven_inputs_are_refused() -> None:
    run_ranks(_refused, 2)


def _gradients(model: nn.Module, rank: int) -> list[Tensor]:
    model.zero_grad()
    _backward(model, 3, rank)
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def _copied(rank: int, world_size: int) -> None:
    for as_view in (True, False):
        ddp = DistributedDataParallel(
            nn.Sequential(make_model(), nn.BatchNorm1d(1)), gradient_as_bucket_view=as_view
        )
        bare = copy.deepcopy(ddp)
        guard = _guard(ddp, lag_steps=0)
        guard.step(_backward(ddp, 0, rank))
        ddp.load_state_dict(bare.state_dict())
        guard.drain()
        stored = io.BytesIO()
        torch.save(ddp, stored)
        assert b"harness" not in stored.getvalue()  # whoever reads it need not have it
        stored.seek(0)
        copies = {
            "deepcopy": copy.deepcopy(ddp),
            "pickle": pickle.loads(pickle.dumps(ddp)),
            "torch.save": torch.load(stored, weights_only=False),
            "AveragedModel": AveragedModel(ddp).module,
        }
        want = _gradients(bare, rank)
        for how, other in copies.items():
            have = _gradients(other, rank)
            assert all(map(torch.equal, want, have)), how
        inner = copy.deepcopy(ddp.module)
        inner.load_state_dict(ddp.module.state_dict())
        inner(batch(0)[0])
        # None of this was seen by the guard; its own model is still watched, and a copy can be guarded too.
        ddp.zero_grad()
        guard.step(_backward(ddp, 1, rank))
        assert not guard.drain()[0].skipped
        assert _guard(copies["deepcopy"]) is not guard


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_guarded_model_is_copied_and_pickled_like_any_other(world_size: int) -> None:
    run_ranks(_copied, world_size)
