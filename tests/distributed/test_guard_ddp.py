"""The guard under DDP: reduced gradients to the last bit, the culprit's rank, all ranks alike."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook, fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from harness.dist import gradient_sync
from harness.errors import ConfigError
from harness.records import StepRecord
from harness.stability import StepGuard
from tests.support.distributed import run_ranks
from tests.support.guarded import OPTIMIZERS, batch, make_model, snapshot, worst_difference

HOOKS: dict[str, Any] = {"plain": None, "bf16": bf16_compress_hook, "fp16": fp16_compress_hook}


def _backward(model: nn.Module, step: int, rank: int, micro_batch: int = 0) -> Tensor:
    inputs, targets = batch(step, rank, micro_batch)
    loss = nn.functional.mse_loss(model(inputs), targets)
    loss.backward()
    return loss


def _gradients(model: nn.Module, rank: int, *, set_to_none: bool, num_micro_batches: int) -> list[Tensor]:
    seen = []
    for step in range(3):
        for micro_batch in range(num_micro_batches):
            with gradient_sync(model, on=micro_batch == num_micro_batches - 1):
                _backward(model, step, rank, micro_batch)
        seen += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad(set_to_none=set_to_none)
    return seen


def _compare_gradients(rank: int, world_size: int, name: str) -> None:
    for set_to_none in (True, False):
        for as_view in (True, False):
            for num_micro_batches in (1, 3):
                wrap = partial(DistributedDataParallel, gradient_as_bucket_view=as_view, bucket_cap_mb=0.0002)
                bare, guarded = wrap(make_model()), wrap(make_model())
                if HOOKS[name] is not None:
                    # Under another name: DDP refuses bf16_compress_hook on the CPU, where gloo can do it.
                    bare.register_comm_hook(None, lambda state, bucket: HOOKS[name](state, bucket))
                StepGuard(guarded, OPTIMIZERS["sgd"](guarded.parameters()), comm_hook=HOOKS[name])
                modes = {"set_to_none": set_to_none, "num_micro_batches": num_micro_batches}
                want, have = _gradients(bare, rank, **modes), _gradients(guarded, rank, **modes)
                assert len(want) == len(have) == 18
                assert all(torch.equal(w, h) for w, h in zip(want, have, strict=True)), (modes, as_view)


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_reduced_gradients_are_bitwise_those_without_the_hook(world_size: int, name: str) -> None:
    run_ranks(_compare_gradients, world_size, name)


def _train(rank: int, world_size: int, culprit: int, bad_micro_batch: int) -> list[StepRecord]:
    model, twin = (DistributedDataParallel(make_model(), gradient_as_bucket_view=True) for _ in range(2))
    optimizer, reference = (OPTIMIZERS["adamw"](m.parameters()) for m in (model, twin))
    guard, twin_guard = StepGuard(model, optimizer), StepGuard(twin, reference)
    for step in range(3):
        for micro_batch in range(3):
            with gradient_sync(model, on=micro_batch == 2):
                strikes = (step, rank, micro_batch) == (1, culprit, bad_micro_batch)
                weight = model.module[2].weight
                handle = weight.register_hook(lambda g: g * math.nan) if strikes else None
                guard.accumulate(_backward(model, step, rank, micro_batch))
                if handle is not None:
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


@pytest.mark.parametrize(("culprit", "bad_micro_batch"), [(0, 2), (1, 0)])
def test_one_ranks_nan_is_skipped_by_all_and_blamed_on_it(culprit: int, bad_micro_batch: int) -> None:
    first, second = run_ranks(_train, 2, culprit, bad_micro_batch)
    assert first == second
    assert [r.verdict == "skip" for r in first] == [False, True, False]
    bad = first[1]
    assert (bad.rank, bad.parameter, bad.micro_batch) == (culprit, "2.weight", bad_micro_batch)
    assert bad.num_nan == 64
    assert bad.per_parameter["2.weight"].num_nan == 64
    assert bad.per_parameter["2.bias"].num_nan == 0
    assert [row.num_nan for row in bad.per_rank] == [64 * (rank == culprit) for rank in range(2)]


def _norms(rank: int, world_size: int) -> tuple[list[StepRecord], float, float]:
    model = DistributedDataParallel(make_model())
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    guard = StepGuard(model, optimizer, max_norm=0.05, per_parameter_every=1)
    own = make_model()
    _backward(own, 0, rank)
    guard.step(_backward(model, 0, rank), compute_s=1.0 + rank, data_wait_s=0.5, stop_requested=rank == 1)
    dist.barrier()
    local = nn.utils.get_total_norm([p.grad for p in own.parameters() if p.grad is not None])
    clipped = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return guard.drain(wait=True), local.item(), clipped.item()


def test_a_record_holds_what_each_rank_said_and_the_reduced_norm() -> None:
    (records, local_0, clipped), (other, local_1, _) = run_ranks(_norms, 2)
    assert records == other
    (record,) = records
    assert [row.grad_norm for row in record.per_rank] == pytest.approx([local_0, local_1], rel=1e-6)
    assert [row.compute_s for row in record.per_rank] == [1.0, 2.0]
    assert [row.stop_requested for row in record.per_rank] == [False, True]
    assert clipped == pytest.approx(0.05, rel=1e-5)
    assert record.clip_coef == pytest.approx(0.05 / record.grad_norm)
    squares = sum(row.grad_norm**2 for row in record.per_parameter.values())
    assert squares**0.5 == pytest.approx(record.grad_norm)


class _Branches(nn.Module):
    """Rank 0 uses one branch, the others the other; `never` is used by none."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.never = nn.Linear(4, 1), nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, inputs: Tensor, rank: int) -> Tensor:
        return self.left(inputs) if rank == 0 else self.right(inputs)


def _unused(rank: int, world_size: int) -> list[StepRecord]:
    torch.manual_seed(0)
    model = DistributedDataParallel(_Branches(), find_unused_parameters=True)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    guard = StepGuard(model, optimizer, per_parameter_every=1)
    for step in range(2):
        loss = model(batch(step, rank)[0], rank).square().mean()
        loss.backward()
        guard.step(loss)
        optimizer.zero_grad()
    return guard.drain(wait=True)


def test_parameters_that_a_rank_does_not_use_are_measured_as_zeros() -> None:
    records, other = run_ranks(_unused, 2)
    assert records == other
    assert [r.skipped for r in records] == [False, False]
    rows = records[1].per_parameter
    assert rows["left.weight"].grad_norm > 0
    assert rows["right.weight"].grad_norm > 0
    assert rows["never.weight"].grad_norm == 0


def _reduced_by_hand(rank: int, world_size: int) -> list[StepRecord]:
    model = make_model()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    guard = StepGuard(model, optimizer, group=dist.group.WORLD)
    for step in range(3):
        loss = _backward(model, step, rank)
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad, op=dist.ReduceOp.AVG)
        # Only one rank sees a bad loss; the gradients are fine everywhere.
        guard.step(loss * math.nan if (step, rank) == (1, 1) else loss)
        optimizer.zero_grad()
    return guard.drain(wait=True)


def test_gradients_that_the_caller_reduces_are_judged_by_all_ranks_alike() -> None:
    records, other = run_ranks(_reduced_by_hand, 2)
    assert [r.verdict == "skip" for r in records] == [r.verdict == "skip" for r in other]
    assert [r.verdict == "skip" for r in records] == [False, True, False]
    assert (records[1].rank, records[1].parameter) == (1, None)
    assert records[1].reason == "the loss is nan on rank 1"


def _static_graph(rank: int, world_size: int) -> list[StepRecord]:
    model = DistributedDataParallel(make_model(), static_graph=True, gradient_as_bucket_view=True)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    guard = StepGuard(model, optimizer)
    for step in range(3):
        guard.step(_backward(model, step, rank))
        optimizer.zero_grad()
    return guard.drain(wait=True)


def test_a_static_graph_is_measured_from_its_first_step_on() -> None:
    records, other = run_ranks(_static_graph, 2)
    assert records == other
    assert all(r.per_rank[0].grad_norm > 0 and not r.skipped for r in records)


def _around_the_wrapper(rank: int, world_size: int) -> list[StepRecord]:
    model = DistributedDataParallel(make_model())
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    guard = StepGuard(model, optimizer)
    guard.step(_backward(model, 0, rank))
    optimizer.zero_grad()
    before = snapshot(model, optimizer)
    guard.step(_backward(model.module, 1, rank))
    assert worst_difference(before, snapshot(model, optimizer)) == ""
    return guard.drain(wait=True)


def test_a_step_whose_gradients_were_never_reduced_is_skipped_and_says_so() -> None:
    records, other = run_ranks(_around_the_wrapper, 2)
    assert records == other
    assert [r.verdict == "skip" for r in records] == [False, True]
    assert records[1].reason is not None
    assert "were not reduced" in records[1].reason


def _registered_twice(rank: int, world_size: int) -> None:
    model = DistributedDataParallel(make_model())
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with StepGuard(model, optimizer) as guard:
        guard.step(_backward(model, 0, rank))
    model.zero_grad()
    _backward(model, 1, rank)  # a closed guard leaves the reduction in place
    with StepGuard(model, optimizer) as guard:
        model.zero_grad()
        guard.step(_backward(model, 2, rank))
        assert guard.drain(wait=True)[0].verdict in ("apply", "clip")
        StepGuard(model, optimizer).close()  # took the hook over, and left it
    model.zero_grad()
    first, second = StepGuard(model, optimizer), StepGuard(model, optimizer)
    first.close()
    second.step(_backward(model, 3, rank))
    assert not second.drain(wait=True)[0].skipped
    with pytest.raises(ConfigError, match="another comm_hook"):
        StepGuard(model, optimizer, comm_hook=bf16_compress_hook)
    hooked = DistributedDataParallel(make_model())
    hooked.register_comm_hook(None, fp16_compress_hook)
    with pytest.raises(ConfigError, match="takes no communication hook"):
        StepGuard(hooked, OPTIMIZERS["adamw"](hooked.parameters()))


def test_a_second_guard_on_the_same_model_takes_over_the_hook() -> None:
    run_ranks(_registered_twice, 2)
