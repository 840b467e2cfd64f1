"""Gradients measured in the backward pass give the same records and weights as those measured after it."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from harness.stability import StepGuard, backward
from harness.stability.layout import Layout
from tests.support.guarded import OPTIMIZERS, batch, make_model, snapshot, worst_difference

NUM_STEPS = 5

Step = Callable[[StepGuard, nn.Sequential, int], None]
"""What a loop does in a step up to `guard.step`, that included."""


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(backward, "CPU_BYTES", 64)  # three groups in this model
    yield
    torch._dynamo.reset()


def loss_of(model: Callable[[Tensor], Tensor], step: int, micro_batch: int = 0) -> Tensor:
    inputs, targets = batch(step, micro_batch=micro_batch)
    return nn.functional.mse_loss(model(inputs), targets)


def one_batch(guard: StepGuard, model: nn.Sequential, step: int) -> None:
    loss = loss_of(model, step)
    loss.backward()
    guard.step(loss)


def changed_afterwards(change: Callable[[nn.Sequential, int], object]) -> Step:
    def run(guard: StepGuard, model: nn.Sequential, step: int) -> None:
        loss = loss_of(model, step)
        loss.backward()
        change(model, step)
        guard.step(loss)

    return run


def _poison_one(model: nn.Sequential, step: int) -> None:
    if step == 2:
        model[2].weight.grad[1, 1] = math.nan


def _replace(model: nn.Sequential, step: int) -> None:
    model[0].weight.grad = model[0].weight.grad * 2
    model[2].weight.grad.data = model[2].weight.grad * 3
    if step == 3:
        model[4].bias.grad = None


def micro_batches(*, told: bool, numbers: tuple[int, ...] = (2, 2, 2, 2, 2)) -> Step:
    def run(guard: StepGuard, model: nn.Sequential, step: int) -> None:
        for micro_batch in range(numbers[step]):
            loss = loss_of(model, step, micro_batch)
            (loss / numbers[step]).backward()
            if told:
                guard.accumulate(loss, weight=1 / numbers[step], is_last=micro_batch + 1 == numbers[step])
        guard.step(*(() if told else (loss,)))

    return run


def with_scaler(*, unscales: bool) -> Step:
    scalers: list[torch.amp.GradScaler] = []  # no longer than the run: other guards would look for its owner

    def run(guard: StepGuard, model: nn.Sequential, step: int) -> None:
        if step == 0:
            scalers.append(torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2))
        loss = loss_of(model, step)
        scalers[0].scale(loss).backward()
        if unscales:
            scalers[0].unscale_(guard._optimizers.unwrapped[0])
        guard.step(loss, scaler=scalers[0])
        scalers[0].update()
        if step == NUM_STEPS - 1:
            scalers.clear()

    return run


def twice_through_one_graph(guard: StepGuard, model: nn.Sequential, step: int) -> None:
    loss = loss_of(model, step)
    loss.backward(retain_graph=True)
    loss.backward()
    guard.step(loss)


def thrown_away(guard: StepGuard, model: nn.Sequential, step: int) -> None:
    loss_of(model, step + 100).backward()
    model.zero_grad()
    one_batch(guard, model, step)


def parts_unused(guard: StepGuard, model: nn.Sequential, step: int) -> None:
    used = model[2:] if step % 2 else model
    inputs, targets = batch(step)
    loss = nn.functional.mse_loss(used(inputs.repeat(1, 2) if step % 2 else inputs), targets)
    loss.backward()
    guard.step(loss)


def checkpointed(guard: StepGuard, model: nn.Sequential, step: int) -> None:
    loss = loss_of(lambda x: model[3:](checkpoint(model[:3], x, use_reentrant=False)), step)
    loss.backward()
    guard.step(loss)


def compiled(guard: StepGuard, model: nn.Sequential, step: int) -> None:
    loss = loss_of(torch.compile(model, backend="aot_eager"), step)
    loss.backward()
    guard.step(loss)


LOOPS: dict[str, Step] = {
    "one batch": one_batch,
    "poisoned": changed_afterwards(_poison_one),
    "clipped before": changed_afterwards(lambda model, _: nn.utils.clip_grad_norm_(model.parameters(), 0.01)),
    "replaced": changed_afterwards(_replace),
    "micro-batches, told": micro_batches(told=True),
    "micro-batches": micro_batches(told=False),
    "more and fewer micro-batches": micro_batches(told=False, numbers=(2, 1, 3, 3, 1)),
    "scaler": with_scaler(unscales=False),
    "scaler, unscaled before": with_scaler(unscales=True),
    "two passes": twice_through_one_graph,
    "thrown away": thrown_away,
    "parts unused": parts_unused,
    "checkpointed": checkpointed,
    "compiled": compiled,
}


def train(
    run: Step, during_backward: Literal["off", "on"], **settings: object
) -> tuple[list[str], dict[str, Tensor]]:
    """The steps' records as text, so that NaN is equal to NaN, and what was trained."""
    model = make_model()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with StepGuard(
        model, optimizer, during_backward=during_backward, per_parameter_every=1, sample_every=2, **settings
    ) as guard:
        for step in range(NUM_STEPS):
            run(guard, model, step)
            optimizer.zero_grad()
        return [repr(record) for record in guard.drain(wait=True)], snapshot(model, optimizer)


@pytest.mark.parametrize("loop", LOOPS)
def test_records_and_weights_are_those_of_measuring_afterwards(loop: str) -> None:
    early, after = (train(LOOPS[loop], switch, extremes_every=2) for switch in ("on", "off"))
    assert early[0] == after[0]
    assert worst_difference(early[1], after[1]) == ""


@pytest.mark.parametrize(
    ("loop", "num_left"),
    [("one batch", 0), ("micro-batches", 0), ("checkpointed", 0), ("clipped before", 6)],
)
def test_what_is_left_to_measure_is_what_has_changed(
    loop: str, num_left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = []

    def run(guard: StepGuard, model: nn.Sequential, step: int) -> None:
        source = guard._device.source
        sources.append(source)
        LOOPS[loop](guard, model, step)

    left: list[int] = []
    measure = backward.BackwardStatistics.current

    def noted(statistics: backward.BackwardStatistics) -> list[tuple[list[nn.Parameter], Tensor]]:
        known = measure(statistics)
        left.append(6 - sum(len(parameters) for parameters, _ in known))
        return known

    monkeypatch.setattr(backward.BackwardStatistics, "current", noted)
    train(run, "on")
    assert left[1:] == [num_left] * (NUM_STEPS - 1)  # the first step knows of no micro-batches yet


def test_of_several_passes_the_last_alone_is_measured() -> None:
    model = make_model()
    measured = backward.BackwardStatistics()
    measured.watch(Layout.of(model.named_parameters(), of=set(model.parameters())))
    for step in range(3):
        for micro_batch in range(3):
            loss_of(model, step, micro_batch).backward()
            assert bool(measured.current()) == (step == 0 or micro_batch == 2)
        measured.start_step()


def test_nothing_is_left_on_the_model_nor_kept_alive() -> None:
    model = make_model()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    guard = StepGuard(model, optimizer, during_backward="on")
    one_batch(guard, model, 0)
    optimizer.zero_grad()
    loss_of(copy.deepcopy(model), 1).backward()
    assert pickle.loads(pickle.dumps(model))[0].weight.equal(model[0].weight)
    loss_of(model, 1).backward()
    gradient = weakref.ref(model[0].weight.grad)
    optimizer.zero_grad()
    assert gradient() is None  # thrown away, and not kept for its statistics
    guard.close()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    dropped = weakref.ref(guard)
    del guard
    gc.collect()
    assert dropped() is None
