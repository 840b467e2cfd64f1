"""The guard around a model of one process: what it applies, what it leaves out, what it says."""

import math

import pytest
import torch
from torch import nn

from harness.errors import ConfigError
from harness.stability import StepGuard
from tests.support.guarded import OPTIMIZERS, batch, make_model, snapshot, worst_difference


def _backward(model: nn.Module, step: int, micro_batch: int = 0) -> torch.Tensor:
    inputs, targets = batch(step, micro_batch=micro_batch)
    loss = nn.functional.mse_loss(model(inputs), targets)
    loss.backward()
    return loss


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_clean_step_is_that_of_clip_grad_norm_and_the_optimizer(name: str) -> None:
    ours, theirs = make_model(), make_model()
    optimizer, reference = OPTIMIZERS[name](ours.parameters()), OPTIMIZERS[name](theirs.parameters())
    guard = StepGuard(ours, optimizer, max_norm=0.1)
    for step in range(4):
        guard.step(_backward(ours, step))
        optimizer.zero_grad()
        _backward(theirs, step)
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
        reference.step()
        reference.zero_grad()
        (record,) = guard.drain(wait=True)
        assert record.verdict == "clip"
        assert record.grad_norm == pytest.approx(norm.item(), rel=1e-6)
        assert record.clip_coef == pytest.approx(0.1 / norm.item(), rel=1e-6)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad_step", [0, 1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_bad_step_leaves_everything_as_if_it_had_never_happened(name: str, bad_step: int) -> None:
    model, twin = make_model(), make_model()
    optimizer, reference = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](twin.parameters())
    with StepGuard(model, optimizer) as guard, StepGuard(twin, reference) as twin_guard:
        for step in range(5):
            loss = _backward(model, step)
            if step == bad_step:
                model[2].weight.grad[1, 1] = math.nan
            else:
                twin_guard.step(_backward(twin, step))
                reference.zero_grad()
            guard.step(loss)
            optimizer.zero_grad()
        records = guard.drain(wait=True)
    assert worst_difference(snapshot(model, optimizer), snapshot(twin, reference)) == ""
    assert [r.verdict == "skip" for r in records] == [step == bad_step for step in range(5)]
    bad = records[bad_step]
    assert (bad.rank, bad.parameter, bad.micro_batch, bad.num_nan) == (0, "2.weight", None, 1)
    assert bad.per_parameter["2.weight"].num_nan == 1
    assert bad.per_parameter["0.weight"].num_nan == 0


def test_a_loss_that_is_not_finite_is_enough_to_skip() -> None:
    model = make_model()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    guard = StepGuard(model, optimizer)
    before = snapshot(model, optimizer)
    loss = _backward(model, 0)
    guard.step(loss * math.inf)
    (record,) = guard.drain(wait=True)
    assert worst_difference(before, snapshot(model, optimizer)) == ""
    assert (record.verdict, record.reason, record.loss) == ("skip", "the loss is inf on rank 0", math.inf)


def test_nonfinite_stop_bears_the_overflows_that_a_smaller_loss_scale_may_cure() -> None:
    model = make_model()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    settings = {"nonfinite": "stop", "precision": torch.float16, "init_loss_scale": 4.0, "ladder": False}
    guard = StepGuard(model, optimizer, **settings)
    verdicts = []
    for step in range(4):
        loss = _backward(model, step)
        model[0].weight.grad[0, 0] = math.inf
        guard.step(loss if step != 1 else loss * math.nan)
        verdicts += [(r.verdict, r.loss_scale) for r in guard.drain(wait=True)]
        optimizer.zero_grad()
    # A loss that is not finite itself is no overflow; a scale of 1 has nothing left to give.
    assert verdicts == [("skip", 4.0), ("stop", 2.0), ("skip", 2.0), ("stop", 1.0)]


def test_nonfinite_stop_says_stop_and_changes_nothing() -> None:
    model = make_model()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    guard = StepGuard(model, optimizer, nonfinite="stop")
    before = snapshot(model, optimizer)
    loss = _backward(model, 0)
    model[0].bias.grad.fill_(-math.inf)
    guard.step(loss)
    assert guard.drain(wait=True)[0].verdict == "stop"
    assert worst_difference(before, snapshot(model, optimizer)) == ""


def test_finite_gradients_whose_squares_overflow_are_clipped_and_not_taken_for_infinite() -> None:
    model = make_model()
    optimizer = OPTIMIZERS["sgd-plain"](model.parameters())
    guard = StepGuard(model, optimizer, max_norm=1.0)
    loss = _backward(model, 0)
    model[4].weight.grad[0, 0] = 1e30
    guard.step(loss)
    (record,) = guard.drain(wait=True)
    assert record.verdict == "clip"
    assert record.grad_norm == pytest.approx(1e30, rel=1e-6)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_the_micro_batch_that_went_bad_is_named(bad: int) -> None:
    model = make_model()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    guard = StepGuard(model, optimizer)
    for micro_batch in range(3):
        loss = _backward(model, 0, micro_batch)
        if micro_batch == bad:
            model[0].weight.grad[0, 0] = math.inf
        guard.accumulate(loss.detach() * 5, 5)
    guard.step()
    (record,) = guard.drain(wait=True)
    assert (record.verdict, record.micro_batch, record.parameter) == ("skip", bad, "0.weight")
    assert record.num_tokens == 15


def test_the_gradient_is_that_of_the_mean_over_all_real_tokens() -> None:
    model, twin = make_model(), make_model()
    optimizer, reference = (OPTIMIZERS["sgd-plain"](m.parameters()) for m in (model, twin))
    guard = StepGuard(model, optimizer, max_norm=None)
    total, count = torch.zeros(()), 0
    for micro_batch, size in enumerate((5, 2)):
        inputs, targets = batch(0, micro_batch=micro_batch, size=size)
        loss = nn.functional.mse_loss(model(inputs), targets, reduction="sum")
        (loss / 10).backward()
        guard.accumulate(loss, size)
        total, count = total + nn.functional.mse_loss(twin(inputs), targets, reduction="sum"), count + size
    (total / count).backward()
    expected = nn.utils.get_total_norm([p.grad for p in twin.parameters()])
    reference.step()
    guard.step(nominal_tokens=10)
    (record,) = guard.drain(wait=True)
    assert record.loss == pytest.approx(total.item() / count)
    assert record.grad_norm == pytest.approx(expected.item(), rel=1e-5)
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


def test_a_batch_without_tokens_is_skipped_with_the_reason() -> None:
    model = make_model()
    guard = StepGuard(model, OPTIMIZERS["adamw"](model.parameters()))
    loss = _backward(model, 0)
    guard.accumulate(loss * 0, 0)
    guard.step(nominal_tokens=10)
    (record,) = guard.drain(wait=True)
    assert (record.verdict, record.reason) == ("skip", "no tokens in the global batch")


def test_records_come_a_fixed_number_of_steps_late() -> None:
    model = make_model()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    guard = StepGuard(model, optimizer, lag_steps=3)
    seen = []
    for step in range(6):
        guard.step(_backward(model, step))
        optimizer.zero_grad()
        seen.append([r.step for r in guard.drain()])
    assert seen == [[], [], [], [0], [1], [2]]
    assert [r.step for r in guard.drain(wait=True)] == [3, 4, 5]


def test_a_parameter_without_a_gradient_counts_for_nothing() -> None:
    model = make_model()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    guard = StepGuard(model, optimizer, per_parameter_every=1)
    model(batch(0)[0]).sum().backward()
    model[2].bias.grad = None
    guard.step(torch.tensor(1.0))
    (record,) = guard.drain(wait=True)
    assert record.per_parameter["2.bias"].grad_norm == 0.0
    assert list(record.per_parameter) == [name for name, _ in model.named_parameters()]
    assert record.verdict == "clip"


def test_a_step_without_any_gradient_is_not_called_applied() -> None:
    model = make_model()
    guard = StepGuard(model, OPTIMIZERS["adamw"](model.parameters()))
    guard.step(torch.tensor(1.0))
    (record,) = guard.drain(wait=True)
    assert (record.verdict, record.grad_norm, record.rank) == ("skip", 0.0, 0)
    assert record.reason == "rank 0 has no gradient: step() came without backward(), or after zero_grad()"


def test_shared_parameters_are_one_and_frozen_ones_are_none() -> None:
    model = make_model()
    model[2].bias = model[0].bias
    model[4].bias.requires_grad_(False)
    guard = StepGuard(model, OPTIMIZERS["adamw"](model.parameters()), per_parameter_every=1)
    guard.step(_backward(model, 0))
    (record,) = guard.drain(wait=True)
    assert list(record.per_parameter) == ["0.weight", "0.bias", "2.weight", "4.weight"]


def test_fp16_overflow_halves_the_scale_and_clean_steps_double_it() -> None:
    model = make_model()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    guard = StepGuard(
        model,
        optimizer,
        precision=torch.float16,
        init_loss_scale=1024.0,
        loss_scale_growth_steps=2,
        lag_steps=0,
    )
    scales = []
    for step in range(5):
        inputs, targets = batch(step)
        loss = nn.functional.mse_loss(model(inputs), targets)
        guard.scale(loss).backward()
        if step == 2:
            model[0].weight.grad[0, 0] = math.inf
        guard.step(loss)
        optimizer.zero_grad()
        scales.append(guard.loss_scale.item())
    assert scales == [1024.0, 2048.0, 1024.0, 1024.0, 2048.0]
    assert [r.verdict == "skip" for r in guard.drain(wait=True)] == [False, False, True, False, False]


def test_the_loss_scale_does_not_show_in_the_update_nor_in_the_record() -> None:
    model, twin = make_model(), make_model()
    for one, scaling in ((model, True), (twin, False)):
        optimizer = OPTIMIZERS["sgd-plain"](one.parameters())
        guard = StepGuard(one, optimizer, precision=torch.float16 if scaling else torch.float32)
        loss = nn.functional.mse_loss(one(batch(0)[0]), batch(0)[1])
        guard.scale(loss).backward()
        guard.step(loss)
        (record,) = guard.drain(wait=True)
        assert record.loss_scale == (65536.0 if scaling else 1.0)
    # A power of two scales without rounding.
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-8)


def test_the_state_of_a_guard_survives_a_restart() -> None:
    model = make_model()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    guard = StepGuard(model, optimizer, precision=torch.float16, loss_scale_growth_steps=2)
    guard.step(_backward(model, 0))
    state = guard.state_dict()
    resumed = StepGuard(model, optimizer, precision=torch.float16, loss_scale_growth_steps=2)
    resumed.load_state_dict(state)
    resumed.step(_backward(model, 1))
    assert resumed.loss_scale.item() == 2 * 65536
    assert [r.step for r in resumed.drain(wait=True)] == [1]


def test_nothing_is_left_on_the_optimizer() -> None:
    model = make_model()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with StepGuard(model, optimizer) as guard:
        for step in range(2):
            guard.step(_backward(model, step))
    assert not hasattr(optimizer, "found_inf")
    assert not hasattr(optimizer, "grad_scale")


def test_an_optimizer_that_cannot_read_the_device_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model()
    guard = StepGuard(model, OPTIMIZERS["rmsprop"](model.parameters()))
    for step in range(3):
        guard.step(_backward(model, step))
    said = [record.message for record in caplog.records if record.name.startswith("harness.stability")]
    assert [message.split()[0] for message in said] == ["RMSprop"]


def test_parameters_bear_the_names_that_their_author_gave_them() -> None:
    outer = nn.Module()
    outer.module = make_model()
    for model in (outer, torch.compile(outer, backend="eager")):
        guard = StepGuard(model, OPTIMIZERS["adamw"](model.parameters()))
        assert guard.layout.names[0] == "module.0.weight"


def test_what_the_guard_cannot_do_is_refused_at_once() -> None:
    model = make_model()
    with pytest.raises(ConfigError, match="LBFGS"):
        StepGuard(model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ConfigError, match="not the model's"):
        StepGuard(model, OPTIMIZERS["adamw"](make_model().parameters()))
    sparse = nn.Embedding(4, 4, sparse=True)
    with pytest.raises(ConfigError, match="sparse"):
        StepGuard(sparse, torch.optim.SparseAdam(sparse.parameters()))
    with pytest.raises(ConfigError, match="without a loss"):
        StepGuard(model, OPTIMIZERS["adamw"](model.parameters())).step()
    guard = StepGuard(model, OPTIMIZERS["adamw"](model.parameters()))
    guard.accumulate(torch.tensor(1.0))
    with pytest.raises(ConfigError, match="once more"):
        guard.step(torch.tensor(1.0))
    with pytest.raises(ConfigError, match="no parameter"):
        StepGuard(model.requires_grad_(False), OPTIMIZERS["adamw"](model.parameters()))
