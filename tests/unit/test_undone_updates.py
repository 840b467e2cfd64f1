"""Updates that leave something not finite though the gradient was: seen in their step, named, taken back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Muon, Optimizer, RMSprop

from harness.errors import ConfigError, InstabilityError
from harness.stability import StepGuard, before
from harness.stability.verdict import Decision
from tests.support.guarded import batch, make_model, snapshot, worst_difference

DIVERGING = {"ns_steps": 40, "ns_coefficients": (9.0, 9.0, 9.0)}
"""A Newton-Schulz iteration that overflows."""

Make = Callable[[Any], Optimizer]

MAKE: dict[str, Make] = {
    "sgd": lambda held: SGD(held, lr=0.1, momentum=0.9),
    "sgd-fused": lambda held: SGD(held, lr=0.1, momentum=0.9, fused=True),
    "adamw-foreach": lambda held: AdamW(held, lr=1e-2, foreach=True),
    "adamw-fused": lambda held: AdamW(held, lr=1e-2, fused=True),
    "rmsprop": lambda held: RMSprop(held, lr=1e-3),
}


def _backward(model: nn.Module, step: int) -> torch.Tensor:
    inputs, targets = batch(step)
    loss = nn.functional.mse_loss(model(inputs), targets)
    loss.backward()
    return loss


def _break(model: nn.Module) -> None:
    """Makes gradients so large, if finite, that SGD's update of rate 1e10 and squares overflow."""
    for parameter in model.parameters():
        parameter.grad.mul_(1e30)


@pytest.fixture(params=["as it is", "as on a device"])
def on_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the verdict is read on the host for nothing, as on the CPU."""
    is_device = request.param == "as on a device"
    if is_device:
        monkeypatch.setattr(Decision, "is_on_host", False)
    return is_device


@pytest.mark.parametrize("bad_step", [0, 2])
@pytest.mark.parametrize("name", MAKE)
def test_an_update_that_overflows_is_taken_back_and_named(name: str, bad_step: int, on_device: bool) -> None:
    model = make_model()
    optimizer = MAKE[name](model.parameters())
    guard = StepGuard(model, optimizer, max_norm=None, undo="always", lag_steps=0)
    for step in range(4):
        loss = _backward(model, step)
        for group in optimizer.param_groups:
            group["lr"] = 1e10 if step == bad_step else 1e-2
        if step == bad_step:
            _break(model)
        found = snapshot(model, optimizer)
        guard.step(loss)
        changed = worst_difference(found, snapshot(model, optimizer))
        assert bool(changed) == (step != bad_step), (step, changed)
        optimizer.zero_grad()
    records = guard.drain(wait=True)
    assert [record.undone for record in records] == [step == bad_step for step in range(4)]
    bad = records[bad_step]
    assert (bad.verdict, bad.rank, bad.parameter) == ("skip", 0, "0.weight")
    assert "the update left 0.weight" in str(bad.reason)
    assert "on rank 0, though the gradient was; it was taken back" in str(bad.reason)
    assert not guard.loss_scale.isnan()


@pytest.mark.parametrize("diverges", [True, False])
def test_what_muon_breaks_is_not_made_by_the_others_either(diverges: bool, on_device: bool) -> None:
    model = make_model()
    hidden = [model[2].weight]
    rest = [p for p in model.parameters() if p is not hidden[0]]
    muon = Muon(hidden, lr=0.02)
    adamw = AdamW(rest, lr=1e-2, fused=True)
    guard = StepGuard(model, [adamw, muon], max_norm=None, lag_steps=0)
    for step in range(3):
        if diverges and step == 2:
            muon.param_groups[0].update(DIVERGING)
        loss = _backward(model, step)
        found = {**snapshot(model, adamw), **snapshot(model, muon)}
        guard.step(loss)
        model.zero_grad()
    (record,) = [record for record in guard.drain(wait=True) if record.step == 2]
    now = {**snapshot(model, adamw), **snapshot(model, muon)}
    assert record.undone == diverges
    assert bool(worst_difference(found, now)) != diverges
    assert record.parameter == ("2.weight" if diverges else None)
    assert bool(guard.applied) != diverges


@pytest.mark.parametrize("undo", ["always", "never"])
@pytest.mark.parametrize("name", ["sgd", "adamw-foreach", "rmsprop"])
def test_a_skipped_step_of_an_unfused_optimizer_is_no_step_and_an_applied_one_is_its_own(
    name: str, undo: str, on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(before, "CHUNK_BYTES", 100)  # several chunks
    model, twin = make_model(), make_model()
    optimizer, reference = MAKE[name](model.parameters()), MAKE[name](twin.parameters())
    guard = StepGuard(model, optimizer, max_norm=None, undo=undo, lag_steps=0)
    for step in range(5):
        loss = _backward(model, step)
        if step == 3:
            model[0].weight.grad[0, 0] = math.nan
        else:
            _backward(twin, step)
            reference.step()
        guard.step(loss)
        model.zero_grad()
        twin.zero_grad()
    records = guard.drain(wait=True)
    assert [record.skipped for record in records] == [step == 3 for step in range(5)]
    assert not any(record.undone for record in records)
    assert "1 NaN and 0 Inf" in str(records[3].reason)
    assert worst_difference(snapshot(model, optimizer), snapshot(twin, reference)) == ""


@pytest.mark.parametrize("undo", ["auto", "never"])
def test_without_undo_the_weights_are_what_the_optimizer_made_of_them(undo: str) -> None:
    model = make_model()
    optimizer = SGD(model.parameters(), lr=1e10)
    guard = StepGuard(model, optimizer, max_norm=None, undo=undo, lag_steps=0)
    loss = _backward(model, 0)
    _break(model)
    guard.step(loss)
    assert not guard.drain(wait=True)[0].undone
    assert not model[0].weight.isfinite().all()


def test_an_undone_step_ends_a_run_that_is_to_stop() -> None:
    model = make_model()
    optimizer = SGD(model.parameters(), lr=1e10)
    guard = StepGuard(model, optimizer, max_norm=None, nonfinite="stop", undo="always", lag_steps=0)
    loss = _backward(model, 0)
    _break(model)
    with pytest.raises(InstabilityError, match=r"the update left 0\.weight"):
        guard.step(loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_and_moments_that_overflow_are_seen(dtype: torch.dtype) -> None:
    model = nn.Linear(4, 4, bias=False).to(dtype)
    optimizer = SGD(model.parameters(), lr=1.0, momentum=0.9)
    guard = StepGuard(model, optimizer, max_norm=None, undo="always", lag_steps=0)
    largest = torch.finfo(dtype).max
    for step, value in enumerate((1.0, largest)):
        model.weight.grad = torch.full_like(model.weight, value)
        kept = model.weight.detach().clone()
        if step == 1:
            optimizer.state[model.weight]["momentum_buffer"].fill_(largest)
        guard.step(torch.tensor(1.0))
    assert [record.undone for record in guard.drain(wait=True)] == [False, True]
    assert torch.equal(model.weight, kept)


def test_a_weight_that_is_infinite_on_purpose_is_no_fault_of_an_update(on_device: bool) -> None:
    model = make_model()
    model.mask = nn.Parameter(torch.tensor([0.0, -math.inf]))
    optimizer = SGD(model.parameters(), lr=1e-2, momentum=0.9)
    guard = StepGuard(model, optimizer, max_norm=None, undo="always", lag_steps=0)
    for step in range(4):
        mask_loss = torch.softmax(model.mask, 0)[0]
        (loss := nn.functional.mse_loss(model(batch(step)[0]), batch(step)[1]) + mask_loss).backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e10 if step == 3 else 1e-2
        if step == 3:
            _break(model)
        guard.step(loss)
        model.zero_grad()
    assert [record.undone for record in guard.drain(wait=True)] == [False, False, False, True]


class _Nested(Optimizer):
    """Keeps moments in lists and dictionaries, and a tensor in its groups."""

    def __init__(self, held: Any) -> None:
        super().__init__(held, {"lr": 1e-2, "scale": torch.ones(())})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["scale"].mul_(0.5)
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("past", [torch.zeros_like(p), {"count": 0, "sum": torch.zeros_like(p)}])
                state["past"][0].add_(p.grad)
                state["past"][1]["sum"].add_(p.grad)
                state["past"][1]["count"] += 1
                p.sub_(p.grad, alpha=group["lr"])


def test_state_in_lists_and_dictionaries_is_taken_back_too() -> None:
    model = make_model()
    optimizer = _Nested(model.parameters())
    guard = StepGuard(model, optimizer, max_norm=None, undo="always", lag_steps=0)
    found = ""
    for step in range(3):
        loss = _backward(model, step)
        if step == 2:
            optimizer.param_groups[0]["lr"] = 1e10
            _break(model)
            found = repr(optimizer.state_dict())
        guard.step(loss)
        model.zero_grad()
    assert guard.drain(wait=True)[2].undone
    assert repr(optimizer.state_dict()) == found


class _Halves(Tensor):
    """An fp32 tensor kept in fp16, as quantised moments are: it has no memory of its own."""

    @staticmethod
    def __new__(cls, held: Tensor) -> _Halves:
        return Tensor._make_wrapper_subclass(cls, held.shape, dtype=torch.float32, device=held.device)

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(str(function))


class _Quantised(Optimizer):
    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                moment = self.state[p].setdefault("moment", _Halves(torch.zeros_like(p, dtype=torch.half)))
                moment.held.add_(p.grad)
                p.sub_(p.grad, alpha=group["lr"])


def test_moments_without_memory_of_their_dtype_are_copied_by_their_parts_and_not_read() -> None:
    model = make_model()
    optimizer = _Quantised(model.parameters(), {"lr": 1e-2})
    settings = {"undo": "always", "lag_steps": 0, "silent_errors": "off", "sample_every": 0}
    guard = StepGuard(model, optimizer, max_norm=None, **settings)
    for step in range(3):
        loss = _backward(model, step)
        if step == 2:
            optimizer.param_groups[0]["lr"] = 1e10
            _break(model)
        found = [optimizer.state[p]["moment"].held.clone() for p in model.parameters() if step]
        guard.step(loss)
        model.zero_grad()
    assert [record.undone for record in guard.drain(wait=True)] == [False, False, True]
    assert all(map(torch.equal, found, [optimizer.state[p]["moment"].held for p in model.parameters()]))


def test_the_default_copies_nothing_of_an_optimizer_with_hooks_and_always_says_how_much(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    copies = before.Before.__init__
    monkeypatch.setattr(
        before.Before, "__init__", lambda self, one: (taken.append(type(one).__name__), copies(self, one))[1]
    )
    for undo in ("auto", "always"):
        model = make_model()
        adamw = MAKE["adamw-fused"](model.parameters())
        adamw.register_step_post_hook(lambda *_: None)
        guard = StepGuard(model, adamw, undo=undo, lag_steps=0)
        for step in range(4):
            loss = _backward(model, step)
            if step == 3:  # known on the host to be left out: no copy
                model[0].weight.grad[0, 0] = math.nan
            guard.step(loss)
            model.zero_grad()
        assert taken == ([] if undo == "auto" else ["AdamW"] * 3)
    said = [one.getMessage() for one in caplog.records if "guard.undo is always" in one.getMessage()]
    num_bytes = sum(3 * p.nbytes + 4 for p in model.parameters())
    assert said == [f"guard.undo is always: {num_bytes / 2**30:.3g} GiB are copied in each step"]


def test_a_copy_for_which_there_is_no_memory_is_an_error_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model()
    guard = StepGuard(model, MAKE["sgd"](model.parameters()), undo="always", lag_steps=0)
    loss = _backward(model, 0)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(before.Before, "__init__", full)
    with pytest.raises(ConfigError, match=r"guard\.undo"):
        guard.step(loss)


def test_muons_way_follows_from_its_class_whatever_is_hooked_on_it() -> None:
    model = make_model()
    optimizer = Muon([model[2].weight], lr=0.1)
    guard = StepGuard(model, [optimizer, SGD([p for p in model.parameters() if p.shape != (8, 8)])])
    stepper = guard._device.stepper
    assert stepper._unfused_way(optimizer) == "select"
    optimizer.register_step_post_hook(lambda *_: None)
    optimizer.step = lambda: None
    assert stepper._unfused_way(optimizer) == "select"
