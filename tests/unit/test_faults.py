"""Rehearsed faults strike where and when they are told to, and nowhere else."""

import math

import pytest
import torch
from torch import nn

from harness.config import FaultConfig
from harness.data import Batch, LossSum
from harness.errors import ConfigError
from harness.training.faults import FaultInjector


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def run(model: nn.Module, injector: FaultInjector, step: int, micro_batch: int = 0) -> LossSum:
    """Forward and backward as the loop does them."""
    batch: Batch = {"x": torch.ones(5, 3)}
    model.zero_grad()
    with injector.armed(step, micro_batch, batch):
        total = model(batch["x"]).square().sum()
        loss = injector.on_loss(LossSum(total, torch.tensor(5), torch.tensor(0)))
        loss.total.backward()
    return loss


def bad_parameters(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


@pytest.mark.parametrize("parameter", ["0.weight", "0.bias", "2.weight"])
def test_a_gradient_fault_strikes_one_element_of_one_parameter(parameter: str) -> None:
    model = network()
    injector = FaultInjector([FaultConfig(step=3, parameter=parameter)], model=model, rank=0)
    run(model, injector, 3)
    assert bad_parameters(model) == [parameter]
    assert model.get_parameter(parameter).grad.isnan().sum() == 1  # type: ignore[union-attr]


@pytest.mark.parametrize(("step", "micro_batch", "rank"), [(2, 0, 0), (4, 0, 0), (3, 1, 0), (3, 0, 1)])
def test_a_fault_spares_other_steps_micro_batches_and_ranks(step: int, micro_batch: int, rank: int) -> None:
    model = network()
    injector = FaultInjector([FaultConfig(step=3)], model=model, rank=rank)
    run(model, injector, step, micro_batch)
    assert bad_parameters(model) == []


def test_nothing_is_left_behind_after_the_strike() -> None:
    model = network()
    faults = [FaultConfig(step=0), FaultConfig(step=0, target="activation", kind="inf")]
    injector = FaultInjector([*faults, FaultConfig(step=0, target="loss")], model=model, rank=0)
    run(model, injector, 0)
    assert bad_parameters(model) != []
    loss = run(model, injector, 1)
    assert bad_parameters(model) == []
    assert loss.total.isfinite()


@pytest.mark.parametrize(("kind", "value"), [("nan", math.nan), ("inf", math.inf), ("-inf", -math.inf)])
def test_a_loss_fault_makes_the_loss_what_it_says(kind: str, value: float) -> None:
    model = network()
    fault = FaultConfig(step=0, kind=kind, target="loss")  # type: ignore[arg-type]
    loss = run(model, FaultInjector([fault], model=model, rank=0), 0)
    torch.testing.assert_close(loss.total, torch.tensor(value), equal_nan=True)


def test_an_overflowing_gradient_is_finite_and_its_square_is_not() -> None:
    model = network()
    fault = FaultConfig(step=0, kind="overflow", parameter="2.bias")
    run(model, FaultInjector([fault], model=model, rank=0), 0)
    gradient = model.get_parameter("2.bias").grad
    assert gradient is not None
    assert gradient.isfinite().all()
    assert gradient.square().isinf().any()


def test_a_spike_scales_the_gradient() -> None:
    model, injector = network(), FaultInjector([], model=network(), rank=0)
    run(model, injector, 0)
    expected = model.get_parameter("0.weight").grad * 50  # type: ignore[operator]
    fault = FaultConfig(step=0, kind="spike", scale=50.0)
    run(model, FaultInjector([fault], model=model, rank=0), 0)
    torch.testing.assert_close(model.get_parameter("0.weight").grad, expected, rtol=0, atol=0)


def test_a_batch_fault_strikes_the_input() -> None:
    model = network()
    injector = FaultInjector([FaultConfig(step=0, target="batch")], model=model, rank=0)
    assert run(model, injector, 0).total.isnan()


def test_an_armed_fault_is_announced_on_its_rank(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="harness"):
        FaultInjector([FaultConfig(step=3, rank=1)], model=network(), rank=0)
        assert caplog.text == ""
        FaultInjector([FaultConfig(step=3, rank=1)], model=network(), rank=1)
    assert "fault armed: nan in gradient of rank 1, step 3" in caplog.text


@pytest.mark.parametrize("target", ["gradient", "activation"])
def test_a_target_that_does_not_exist_fails_on_every_rank(target: str) -> None:
    fault = FaultConfig(step=0, rank=1, parameter="3.weight", target=target)  # type: ignore[arg-type]
    for rank in (0, 1):
        with pytest.raises(ConfigError, match=r"3\.weight"):
            FaultInjector([fault], model=network(), rank=rank)
