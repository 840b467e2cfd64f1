"""What a skipped step's forward passes did to buffers is undone, to the bit; that of other steps stays."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from harness.stability import StepGuard
from harness.stability.buffers import STEPS_UNTIL_CONSTANT
from tests.support.guarded import batch

STEPS, BAD = 6, 3


class _Own(nn.Module):
    """A model of one layer and a `change` of its buffers in each forward pass."""

    def __init__(self, change: Callable[[Any, Tensor], None], **buffers: Tensor | None) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.change = change
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=name != "transient")

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            self.change(self, inputs)
        return self.layer(inputs)


def _replace(module: Any, inputs: Tensor) -> None:
    module.mean = 0.9 * module.mean + 0.1 * inputs.mean(0)
    module.count = module.count + 1


def _write_through_data(module: Any, inputs: Tensor) -> None:
    module.mean.data.lerp_(inputs.mean(0), 0.1)


def _write_large(module: Any, inputs: Tensor) -> None:
    module.queue.data.index_copy_(1, module.count.remainder(8).view(1), inputs.mean().expand(1 << 15, 1))
    module.count += 1


def _shift(module: Any, inputs: Tensor) -> None:
    module.before, module.now = module.now, inputs.sum().expand(1 << 15).clone()


def _initialise(module: Any, inputs: Tensor) -> None:
    if not module.ready:
        module.scale.copy_(inputs.std(0))
        module.ready.fill_(True)
    module.transient.add_(inputs.mean().half())


def _grow(module: Any, inputs: Tensor) -> None:
    module.history = torch.cat([module.history, inputs[:1]])


def _create(module: Any, inputs: Tensor) -> None:
    seen = inputs.mean(0)
    module.seen = seen if module.seen is None else torch.minimum(module.seen, seen)


def _transposed(module: Any, inputs: Tensor) -> None:
    module.table.t().add_(inputs.mean())
    module.part += inputs.mean()


def _batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))


class _Recomputed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden: Tensor = checkpoint(lambda x: self.norm(self.layer(x)), inputs, use_reentrant=False)
        return self.head(hidden)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": _batch_norm,
    "cumulative batch norm": lambda: nn.Sequential(nn.BatchNorm1d(4, momentum=None), nn.Linear(4, 1)),
    "spectral norm": lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(4, 8)), nn.Linear(8, 1)
    ),
    "recomputed": _Recomputed,
    "replaced": lambda: _Own(_replace, mean=torch.zeros(4), count=torch.tensor(0)),
    "through data": lambda: _Own(_write_through_data, mean=torch.zeros(4)),
    "large queue": lambda: _Own(_write_large, queue=torch.zeros(1 << 15, 8), count=torch.tensor(0)),
    "shifted": lambda: _Own(_shift, now=torch.zeros(1 << 15), before=torch.ones(1 << 15)),
    "initialised from data": lambda: _Own(
        _initialise,
        scale=torch.ones(4),
        ready=torch.tensor(False),
        transient=torch.zeros(3, dtype=torch.float16),
    ),
    "growing": lambda: _Own(_grow, history=torch.zeros(0, 4)),
    "absent at first": lambda: _Own(_create, seen=None),
    "strided": lambda: _Own(
        _transposed, table=torch.zeros(3, 5).t(), part=torch.zeros(9)[::2], mask=torch.ones(1).expand(4)
    ),
}


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def _train(
    model: nn.Module, guard: StepGuard, optimizer: torch.optim.Optimizer, *, bad: bool
) -> list[dict[str, Tensor]]:
    """Buffers after each step; of the bad one, those after the step before if it is left out."""
    seen: list[dict[str, Tensor]] = []
    for step in range(STEPS):
        if step == BAD and not bad:
            seen.append(seen[-1])
            continue
        for micro_batch in range(2):
            inputs, targets = batch(step, micro_batch=micro_batch)
            if (step, micro_batch) == (BAD, 1):
                inputs[0, 0] = math.nan
            loss = nn.functional.mse_loss(model(inputs), targets)
            loss.backward()
            guard.accumulate(loss)
        guard.step()
        optimizer.zero_grad()
        seen.append(_buffers(model))
    return seen


def _guarded(model: nn.Module, **settings: Any) -> tuple[StepGuard, torch.optim.Optimizer]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, fused=True)
    return StepGuard(model, optimizer, **settings), optimizer


def _is_as_without_the_bad_step(model: nn.Module, twin: nn.Module) -> None:
    guard, optimizer = _guarded(model)
    have = _train(model, guard, optimizer, bad=True)
    assert [record.skipped for record in guard.drain(wait=True)] == [step == BAD for step in range(STEPS)]
    want = _train(twin, *_guarded(twin), bad=False)
    for one, other in zip(have, want, strict=True):
        assert list(one) == [*other] != []
        assert all(torch.equal(one[name], other[name]) for name in other)
    assert any(not torch.equal(want[0][name], want[-1][name]) for name in want[0])


@pytest.mark.parametrize("name", MODELS)
def test_buffers_are_as_if_the_skipped_step_had_never_been(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    _is_as_without_the_bad_step(model, copy.deepcopy(model))


def test_buffers_of_a_compiled_model_are_brought_back_too() -> None:
    torch.manual_seed(0)
    model = _batch_norm()
    twin = torch.compile(copy.deepcopy(model), backend="aot_eager")
    _is_as_without_the_bad_step(torch.compile(model, backend="aot_eager"), twin)


def test_a_first_step_that_is_skipped_leaves_buffers_as_they_were_built() -> None:
    model = _batch_norm()
    start = _buffers(model)
    guard, _ = _guarded(model)
    loss = model(torch.full((5, 4), math.inf)).mean()
    loss.backward()
    guard.step(loss)
    assert all(torch.equal(start[name], buffer) for name, buffer in model.named_buffers())


def test_an_overflow_of_the_loss_scale_counts_as_no_step_for_buffers_either() -> None:
    model = _batch_norm()
    guard, _ = _guarded(model, precision=torch.float16, init_loss_scale=2.0**24)
    loss = model(batch(0)[0]).mean()
    guard.scale(loss * 1e35).backward()
    guard.step(loss)
    assert model[1].num_batches_tracked == 0


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("guard_first", [False, True])
def test_what_is_loaded_between_steps_is_what_a_skip_goes_back_to(assign: bool, guard_first: bool) -> None:
    model, saved = _batch_norm(), _batch_norm()
    saved(batch(7)[0])
    guard, optimizer = _guarded(model)
    _train(model, guard, optimizer, bad=True)
    state = guard.state_dict()
    if guard_first:
        guard.load_state_dict(state)
    model.load_state_dict(copy.deepcopy(saved.state_dict()), assign=assign)
    if not guard_first:
        guard.load_state_dict(state)
    loss = model(torch.full((5, 4), math.nan)).mean()
    guard.step(loss)
    assert torch.equal(model[1].running_mean, saved[1].running_mean)
    assert model[1].num_batches_tracked == 1


def test_a_large_constant_is_left_out_and_taken_in_again_once_it_changes() -> None:
    model = _Own(lambda module, inputs: None, table=torch.zeros(1 << 15))
    guard, _ = _guarded(model)

    def step(inputs: Tensor) -> None:
        loss = model(inputs).mean()
        loss.backward()
        guard.step(loss)
        model.zero_grad()

    for number in range(STEPS_UNTIL_CONSTANT + 2):
        step(batch(number)[0])
    assert not guard._device.buffers._blocks  # nothing is copied any more
    model.change = lambda module, inputs: module.table.add_(1.0)
    step(batch(20)[0])
    step(torch.full((5, 4), math.nan))
    assert bool((model.table == 1.0).all())


def test_a_buffer_keeps_its_tensor_and_a_graph_over_it_stays_usable() -> None:
    model = _Own(_replace, mean=torch.ones(4), count=torch.tensor(0))
    mean = model.mean
    guard, _ = _guarded(model)
    weight = torch.ones(4, requires_grad=True)
    kept = (weight * model.mean).sum()
    loss = model(batch(0)[0]).mean()
    loss.backward()
    guard.step(loss)
    assert model.mean is mean
    kept.backward()


def test_a_guarded_model_is_copied_and_pickled_like_any_other() -> None:
    model = _batch_norm()
    guard, optimizer = _guarded(model)
    pickled = pickle.dumps(model)
    assert b"harness" not in pickled  # whoever reads it need not have it
    for other in (copy.deepcopy(model), pickle.loads(pickled), AveragedModel(model)):
        state = other.state_dict()
        other.load_state_dict(state)
        other(batch(0)[0])
    _train(model, guard, optimizer, bad=True)
    assert all(torch.isfinite(buffer).all() for buffer in model.buffers())


def test_a_closed_guard_leaves_buffers_alone() -> None:
    model = _batch_norm()
    guard, _ = _guarded(model)
    guard.close()
    assert not any(module._load_state_dict_post_hooks for module in model.modules())
