"""The guard and the optimizers of other people: wrapped, contained, several, changed while a run goes on."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from harness.errors import ConfigError
from harness.stability import StepGuard
from harness.stability.layout import Layout
from harness.stability.sources import GradientStatistics, RowTable
from tests.support.guarded import OPTIMIZERS, batch, make_model, snapshot, worst_difference

Parameters = Iterator[nn.Parameter]


def _backward(model: nn.Module, step: int, scale: float = 1.0) -> Tensor:
    inputs, targets = batch(step)
    loss = nn.functional.mse_loss(model(inputs), targets) * scale
    loss.backward()
    return loss


class _Lookahead(Optimizer):
    """Slow weights that follow the fast ones every other step; the optimizer that computes stands inside."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.param_groups, self.state = optimizer, optimizer.param_groups, optimizer.state
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        self.num_steps = 0

    def step(self, closure: object = None) -> None:
        self.optimizer.step()
        self.num_steps += 1
        if self.num_steps % 2 == 0:
            with torch.no_grad():
                for slow, p in zip(self.slow, self.param_groups[0]["params"], strict=True):
                    p.copy_(slow.lerp_(p, 0.5))


class _Container(Optimizer):
    """Two fused optimizers behind one facade, as torchtitan has them."""

    def __init__(self, parameters: Parameters) -> None:
        held = list(parameters)
        self.optimizers = [AdamW(held[:2], lr=1e-2, fused=True), AdamW(held[2:], lr=1e-2, fused=True)]
        super().__init__(held, {"fused": True})

    def step(self, closure: object = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


class _Sam(Optimizer):
    """An optimizer under the name `base_optimizer`, and decay of its own."""

    def __init__(self, parameters: Parameters) -> None:
        self.base_optimizer = SGD(parameters, lr=1e-2, fused=True)
        self.param_groups, self.state = self.base_optimizer.param_groups, self.base_optimizer.state

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        self.base_optimizer.step()
        for p in self.param_groups[0]["params"]:
            p.mul_(0.999)


class _OwnStep(AdamW):
    """A subclass whose step does more than torch's."""

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        super().step()
        for p in self.param_groups[0]["params"]:
            p.mul_(0.999)


def _with_hook(parameters: Parameters) -> Optimizer:
    optimizer = AdamW(parameters, lr=1e-2, fused=True)

    def decay(self: Any, args: Any, kwargs: Any) -> None:
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.mul_(0.999)

    optimizer.register_step_post_hook(decay)
    return optimizer


def _patched(parameters: Parameters) -> Optimizer:
    optimizer = AdamW(parameters, lr=1e-2, fused=True)
    inner = optimizer.step

    def step(closure: object = None) -> None:
        inner()
        with torch.no_grad():
            for p in optimizer.param_groups[0]["params"]:
                p.mul_(0.999)

    optimizer.step = step  # type: ignore[method-assign]
    return optimizer


def _wrapped(parameters: Parameters) -> Optimizer:
    optimizer = _patched(parameters)
    optimizer.step = functools.wraps(AdamW.step)(optimizer.step)  # type: ignore[method-assign]
    return optimizer


WRAPPERS: dict[str, Callable[[Parameters], Any]] = {
    "lookahead": lambda parameters: _Lookahead(SGD(parameters, lr=0.1, momentum=0.9, fused=True)),
    "container": _Container,
    "base-optimizer": _Sam,
    "own-step": lambda parameters: _OwnStep(parameters, lr=1e-2, fused=True),
    "subclass": lambda parameters: type("Renamed", (AdamW,), {})(parameters, lr=1e-2, fused=True),
    "step-hook": _with_hook,
    "patched-step": _patched,
    "wrapped-step": _wrapped,
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_any_optimizer_does_what_the_record_says(name: str) -> None:
    ours, theirs = make_model(), make_model()
    optimizer, reference = WRAPPERS[name](ours.parameters()), WRAPPERS[name](theirs.parameters())
    guard = StepGuard(ours, optimizer, max_norm=0.1)
    for step in range(6):
        loss = _backward(ours, step)
        if step in (1, 4):
            ours[2].weight.grad[0, 0] = math.nan
        else:
            _backward(theirs, step)
            nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
            reference.step()
        guard.step(loss)
        ours.zero_grad()
        theirs.zero_grad()
    verdicts = [record.verdict for record in guard.drain(wait=True)]
    assert verdicts == ["clip", "skip", "clip", "clip", "skip", "clip"]
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_only_steps_of_torchs_own_are_trusted_with_the_device(caplog: pytest.LogCaptureFixture) -> None:
    for name in ("container", "own-step", "step-hook", "patched-step", "wrapped-step"):
        model = make_model()
        caplog.clear()
        StepGuard(model, WRAPPERS[name](model.parameters()))
        assert "on the host" in caplog.text, name
    caplog.clear()
    optimizer = AdamW(model.parameters(), fused=True)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # puts a wrapper of its own around step
    StepGuard(model, optimizer)
    assert caplog.text == ""


class _Deaf(AdamW):
    """Looks like torch's own, and never sees what it is told."""

    found_inf = grad_scale = property(lambda self: None, lambda self, value: None, lambda self: None)


def test_an_optimizer_that_ignores_the_verdict_is_found_out() -> None:
    model = make_model()
    optimizer = _Deaf(model.parameters(), lr=1e-2, fused=True)
    guard = StepGuard(model, optimizer, max_norm=None)
    for number in range(4):
        loss = _backward(model, number)
        guard.step(loss if number != 2 else loss * math.nan)
        optimizer.zero_grad()
    records = guard.drain(wait=True)
    assert [record.verdict for record in records] == ["apply", "apply", "skip", "skip"]
    assert "a fused optimizer of rank 0 has changed parameters" in str(records[3].reason)

    clipping = StepGuard(model, optimizer, max_norm=1e-3)
    for number in range(3):
        clipping.step(_backward(model, number))
        optimizer.zero_grad()
    assert "has not divided gradients" in str(clipping.drain(wait=True)[-1].reason)


@pytest.mark.parametrize("name", ["adamw", "sgd", "rmsprop"])
def test_what_the_optimizer_takes_in_later_is_guarded_from_that_step_on(name: str) -> None:
    model, twin = make_model(), make_model()
    for one in (model, twin):
        one[0].requires_grad_(False)
    optimizer = OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad])
    reference = OPTIMIZERS[name]([p for p in twin.parameters() if p.requires_grad])
    guard = StepGuard(model, optimizer, max_norm=0.1)
    for step in range(5):
        if step == 2:  # thaw
            for one, steps in ((model, optimizer), (twin, reference)):
                one[0].requires_grad_(True)
                steps.add_param_group({"params": list(one[0].parameters())})
        loss = _backward(model, step)
        if step == 3:
            model[0].weight.grad[0, 0] = math.nan
        else:
            _backward(twin, step)
            norm = nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
            reference.step()
        guard.step(loss)
        (record,) = guard.drain(wait=True)
        assert record.verdict == ("skip" if step == 3 else "clip")
        if step == 3:
            assert (record.parameter, record.num_nan) == ("0.weight", 1)
        else:
            assert record.grad_norm == pytest.approx(float(norm), rel=1e-6)
        optimizer.zero_grad()
        reference.zero_grad()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_a_replaced_parameter_is_guarded_and_a_strange_one_is_an_error_before_anything_moves() -> None:
    model = make_model()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    guard = StepGuard(model, optimizer)
    guard.step(_backward(model, 0))
    old = model[4].weight
    model[4].weight = nn.Parameter(old.detach().clone())
    held = optimizer.param_groups[0]["params"]
    held[[p is old for p in held].index(True)] = model[4].weight
    optimizer.zero_grad()
    loss = _backward(model, 1)
    model[4].weight.grad[0, 0] = math.inf
    before = snapshot(model, optimizer)
    guard.step(loss)
    assert guard.drain(wait=True)[-1].parameter == "4.weight"
    assert worst_difference(before, snapshot(model, optimizer)) == ""

    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(7, 2))]})
    with pytest.raises(ConfigError, match=r"not the model's, of shapes \(7, 2\)"):
        guard.step(_backward(model, 2))
    assert worst_difference(before, snapshot(model, optimizer)) == ""


def test_a_gan_that_freezes_one_side_in_turn_is_judged_side_by_side() -> None:
    generator, critic = make_model(1), make_model(2)
    both = nn.ModuleDict({"generator": generator, "critic": nn.Linear(1, 1)})
    critic = both["critic"]
    optimizers = {name: OPTIMIZERS["adamw"](both[name].parameters()) for name in both}
    guards = {name: StepGuard(both, optimizers[name], max_norm=None) for name in both}
    for step in range(4):
        for name, other in (("critic", "generator"), ("generator", "critic")):
            both[name].requires_grad_(True)
            both[other].requires_grad_(False)
            loss = critic(generator(batch(step)[0])).mean()
            loss.backward()
            expected = nn.utils.get_total_norm([p.grad for p in both[name].parameters()])
            guards[name].step(loss)
            (record,) = guards[name].drain(wait=True)
            assert record.verdict == "apply"
            assert record.grad_norm == pytest.approx(float(expected), rel=1e-6)
            optimizers[name].zero_grad()


def test_the_gradient_that_counts_is_the_optimizers(caplog: pytest.LogCaptureFixture) -> None:
    """A linear probe: the backbone takes a gradient that nobody clears."""
    model = make_model()
    optimizer = OPTIMIZERS["adamw"](model[4].parameters())
    guard = StepGuard(model, optimizer, max_norm=None, per_parameter_every=1)
    for step in range(4):
        loss = _backward(model, step)
        expected = nn.utils.get_total_norm([p.grad for p in model[4].parameters()])
        model[0].weight.grad[0, 0] = math.nan  # nobody's
        guard.step(loss)
        (record,) = guard.drain(wait=True)
        assert (record.verdict, record.grad_norm) == ("apply", pytest.approx(float(expected), rel=1e-6))
        assert list(record.per_parameter) == ["4.weight", "4.bias"]
        optimizer.zero_grad()
    said = [r.getMessage() for r in caplog.records if "no guarded optimizer holds" in r.getMessage()]
    assert len(said) == 1
    assert "0.weight, 0.bias, 2.weight and 1 more" in said[0]


def test_several_optimizers_have_one_norm_and_one_verdict() -> None:
    ours, theirs = make_model(), make_model()

    def optimizers(model: nn.Module) -> list[Optimizer]:
        return [
            SGD(model[0].parameters(), lr=0.1),
            AdamW([*model[2].parameters(), *model[4].parameters()], lr=1e-2, fused=True),
        ]

    mine, others = optimizers(ours), optimizers(theirs)
    guard = StepGuard(ours, mine, max_norm=0.1, sample_every=1)
    for step in range(4):
        loss = _backward(ours, step)
        if step == 2:
            ours[4].bias.grad.fill_(math.inf)
        else:
            _backward(theirs, step)
            norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
            for optimizer in others:
                optimizer.step()
        guard.step(loss)
        (record,) = guard.drain(wait=True)
        assert record.verdict == ("skip" if step == 2 else "clip")
        if step != 2:
            assert record.grad_norm == pytest.approx(float(norm), rel=1e-6)
        for model in (ours, theirs):
            model.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="held by two optimizers"):
        StepGuard(ours, [SGD(ours.parameters(), lr=0.1), AdamW(ours[0].parameters())])
    with pytest.raises(ConfigError, match="no optimizer"):
        StepGuard(ours, [])
    with pytest.raises(ConfigError, match="a dict in place of an optimizer"):
        StepGuard(ours, {})


@pytest.mark.parametrize("order", [("body", "head"), ("head", "body")])
def test_two_guards_on_two_parts_do_not_depend_on_their_order(order: tuple[str, str]) -> None:
    ours, theirs = make_model(), make_model()

    def parts(model: nn.Module) -> dict[str, list[nn.Parameter]]:
        return {"body": [*model[0].parameters(), *model[2].parameters()], "head": [*model[4].parameters()]}

    mine = {name: SGD(held, lr=0.1) for name, held in parts(ours).items()}
    others = {name: SGD(held, lr=0.1) for name, held in parts(theirs).items()}
    guards = {name: StepGuard(ours, optimizer, max_norm=0.05) for name, optimizer in mine.items()}
    for step in range(3):
        loss = _backward(ours, step)
        _backward(theirs, step)
        for name in order:
            norm = nn.utils.clip_grad_norm_(parts(theirs)[name], 0.05)
            others[name].step()
            guards[name].step(loss)
            assert guards[name].drain(wait=True)[0].grad_norm == pytest.approx(float(norm), rel=1e-6)
        for model in (ours, theirs):
            model.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_closed_guard_and_one_that_was_replaced_apply_nothing() -> None:
    model = make_model()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    first = StepGuard(model, optimizer)
    second = StepGuard(model, optimizer)
    loss = _backward(model, 0) * math.nan
    before = snapshot(model, optimizer)
    with pytest.raises(ConfigError, match="a later guard watches its parameters"):
        first.step(loss)
    second.close()
    with pytest.raises(ConfigError, match="any more: it was closed"):
        second.step(loss)
    with pytest.raises(ConfigError, match="any more: it was closed"):
        second.accumulate(loss)
    assert worst_difference(before, snapshot(model, optimizer)) == ""


@pytest.mark.parametrize("kind", ["adam", "sgd", "adagrad"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_checkpoint_may_bring_other_flags(kind: str, fused: bool) -> None:
    """torch's `load_state_dict` takes the flags of the file over into the live optimizer."""
    make = {
        "adam": lambda p, f: torch.optim.Adam(p, lr=1e-2, fused=f),
        "sgd": lambda p, f: SGD(p, lr=1e-2, momentum=0.9, fused=f),
        "adagrad": lambda p, f: torch.optim.Adagrad(p, lr=1e-2, fused=f),
    }[kind]
    other = make_model()
    theirs = make(other.parameters(), not fused)
    _backward(other, 0)
    theirs.step()
    model = make_model()
    optimizer = make(model.parameters(), fused)
    guard = StepGuard(model, optimizer)
    guard.step(_backward(model, 0))
    optimizer.load_state_dict(theirs.state_dict())
    for step in (1, 2):
        optimizer.zero_grad()
        loss = _backward(model, step)
        if step == 2:
            model[0].weight.grad[0, 0] = math.nan
            before = snapshot(model, optimizer)
        guard.step(loss)
    assert [r.verdict == "skip" for r in guard.drain(wait=True)] == [False, False, True]
    assert worst_difference(before, snapshot(model, optimizer)) == ""


def test_a_gradient_that_stays_in_a_layer_frozen_again_is_measured() -> None:
    """Thawed for one backward pass, frozen before the step: torch's optimizers apply it all the same."""
    model = make_model()
    model[0].requires_grad_(False)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    guard = StepGuard(model, optimizer)
    guard.step(_backward(model, 0))
    optimizer.zero_grad()
    model[0].requires_grad_(True)
    loss = _backward(model, 1)
    model[0].requires_grad_(False)
    model[0].weight.grad[0, 0] = math.nan
    before = snapshot(model, optimizer)
    guard.step(loss)
    assert guard.drain(wait=True)[-1].parameter == "0.weight"
    assert worst_difference(before, snapshot(model, optimizer)) == ""


def test_an_error_about_what_is_held_stays_one_until_it_is_mended() -> None:
    model = make_model()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    guard = StepGuard(model, optimizer)
    stranger = nn.Parameter(torch.zeros(3))
    optimizer.add_param_group({"params": [stranger]})
    for step in range(2):
        loss = _backward(model, step)
        stranger.grad = torch.full((3,), math.nan)
        with pytest.raises(ConfigError, match="not the model's"):
            guard.step(loss)
    assert stranger.tolist() == [0.0, 0.0, 0.0]
    twice = StepGuard(model, [SGD(model[0].parameters(), lr=0.1), SGD(model[2].parameters(), lr=0.1)])
    twice._optimizers.unwrapped[1].add_param_group({"params": list(model[0].parameters())})
    with pytest.raises(ConfigError, match="held by two optimizers"):
        twice.step(_backward(model, 2))


def test_a_skip_undoes_the_buffers_of_a_module_that_came_later() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    guard = StepGuard(model, optimizer)
    for step in range(3):
        if step == 1:
            model.append(nn.BatchNorm1d(4))
            optimizer.add_param_group({"params": list(model[1].parameters())})
        inputs = batch(step)[0] * (math.nan if step == 2 else 1.0)
        loss = model(inputs).square().sum()
        loss.backward()
        guard.step(loss)
        optimizer.zero_grad()
    assert [r.verdict == "skip" for r in guard.drain(wait=True)] == [False, False, True]
    assert bool(model[1].running_mean.isfinite().all())


def test_a_skip_in_one_guard_leaves_the_buffers_that_another_ones_step_has_settled() -> None:
    model = nn.ModuleDict({"critic": nn.BatchNorm1d(4), "generator": nn.Linear(4, 4)})
    optimizers = {name: OPTIMIZERS["adamw"](part.parameters()) for name, part in model.items()}
    guards = {name: StepGuard(model, optimizer) for name, optimizer in optimizers.items()}
    for step in range(3):
        for name in ("critic", "generator"):
            loss = model["critic"](model["generator"](batch(step)[0])).square().sum()
            loss.backward()
            guards[name].step(loss * (math.nan if name == "generator" else 1.0))
            model.zero_grad()
    assert int(model["critic"].num_batches_tracked) == 3


def test_a_step_without_a_gradient_is_no_overflow_of_the_loss_scale() -> None:
    model = make_model()
    guard = StepGuard(model, OPTIMIZERS["adamw"](model.parameters()), precision=torch.float16)
    guard.step(torch.tensor(1.0))
    assert guard.loss_scale.item() == 65536.0


def test_statistics_do_not_pile_up_in_a_guard_that_is_not_stepped() -> None:
    seen, table = GradientStatistics(), RowTable(Layout.of([("w", p := nn.Parameter(torch.ones(2)))], of=[p]))
    bad, good = torch.tensor([[1.0, 1, 1, 0, 0]]).double(), torch.tensor([[4.0, 2, 0, 0, 0]]).double()
    for statistics, adds in ((bad, False), (good, False), (good, True)):
        seen.note([p], statistics, adds=[adds])
    assert len(seen._notes) == 1
    assert seen.rows(table).tolist() == [[8.0, 2.0, 0.0, 0.0, 0.0]]
