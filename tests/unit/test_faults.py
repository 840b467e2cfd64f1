"""Rehearsed faults strike where and when they are told to, and nowhere else."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from harness.config import FaultConfig, parse_arguments
from harness.data import Batch, LossSum
from harness.errors import ConfigError
from harness.training.faults import FaultInjector, possible_faults


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


def test_an_armed_fault_is_announced_on_its_rank(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="harness"):
        FaultInjector([FaultConfig(step=3, rank=1)], model=network(), rank=0).begin_at(0, tmp_path)
        assert caplog.text == ""
        FaultInjector([FaultConfig(step=3, rank=1)], model=network(), rank=1).begin_at(0, tmp_path)
    assert "fault armed: nan in gradient of rank 1, step 3" in caplog.text


@pytest.mark.parametrize("target", ["gradient", "activation"])
def test_a_target_that_does_not_exist_fails_on_every_rank(target: str) -> None:
    fault = FaultConfig(step=0, rank=1, parameter="3.weight", target=target)  # type: ignore[arg-type]
    for rank in (0, 1):
        with pytest.raises(ConfigError, match=r"3\.weight"):
            FaultInjector([fault], model=network(), rank=rank)


class Recurrent(nn.Module):
    """A module with a tuple as its output, one that holds tensors in a dict, and a parameter that is used
    without its module's forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = nn.LSTM(3, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.named = Named()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, _ = self.rnn(x)
        x, _ = self.attention(x, x, x)
        out: torch.Tensor = self.named(x)["logits"]
        return out


class Named(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {"ids": torch.arange(3), "cache": None, "logits": x * 2}


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = network(), reentrant

    def forward(self, x: torch.Tensor) -> Any:
        return checkpoint(self.inner, x.requires_grad_(), use_reentrant=self.reentrant)


def compiled(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, list[str]]]] = {
    "compiled": (
        lambda: compiled(network()),
        {"gradient": ["0.weight", "2.bias"], "activation": ["0", "1", "2"]},
    ),
    "compiled inside": (
        lambda: nn.Sequential(compiled(network()), torch.compile(nn.Linear(2, 2), backend="eager")),
        {"gradient": ["0.2.weight", "1._orig_mod.weight"], "activation": ["0.1", "0"]},
    ),
    "tuples, dicts and borrowed parameters": (
        Recurrent,
        {
            "gradient": ["rnn.weight_hh_l0", "attention.out_proj.weight"],
            "activation": ["rnn", "attention", "named"],
        },
    ),
    "checkpointed": (
        lambda: Checkpointed(False),
        {"gradient": ["inner.0.weight"], "activation": ["inner.0", "inner"]},
    ),
    "checkpointed, reentrant": (
        lambda: Checkpointed(True),
        {"gradient": ["inner.0.weight"], "activation": ["inner.0", "inner"]},
    ),
}


@pytest.mark.parametrize(
    ("name", "target", "parameter"),
    [
        (name, target, parameter)
        for name, (_, targets) in MODELS.items()
        for target, parameters in targets.items()
        for parameter in parameters
    ],
)
@pytest.mark.filterwarnings("default:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's
def test_a_fault_strikes_however_the_model_runs(
    name: str, target: Any, parameter: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = MODELS[name][0]()
    fault = FaultConfig(step=1, target=target, parameter=parameter)
    injector = FaultInjector([fault], model=model, rank=0)
    run(model, injector, 0)
    assert bad_parameters(model) == []
    loss = run(model, injector, 1)
    if target == "gradient":
        assert bad_parameters(model) == [parameter]
    else:
        assert loss.total.isnan()
    assert "fault strikes" in caplog.text
    run(model, injector, 2)
    assert bad_parameters(model) == []


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_spike_under_checkpointing_is_as_large_as_it_says(reentrant: bool) -> None:
    model = Checkpointed(reentrant)
    run(model, FaultInjector([], model=model, rank=0), 0)
    expected = model.get_parameter("inner.0.weight").grad * 50  # type: ignore[operator]
    fault = FaultConfig(step=0, kind="spike", scale=50.0, parameter="inner.0.weight")
    run(model, FaultInjector([fault], model=model, rank=0), 0)
    torch.testing.assert_close(model.get_parameter("inner.0.weight").grad, expected, rtol=0, atol=0)


def test_a_fault_that_nothing_passed_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    model.register_module("unused", nn.Linear(2, 2))
    model.forward = lambda x: model[2](model[0](x))  # type: ignore[assignment,operator,index]
    faults = [FaultConfig(step=0, parameter="unused.weight"), FaultConfig(step=0, parameter="0.weight")]
    run(model, FaultInjector(faults, model=model, rank=0), 0)
    assert "fault missed, nothing passed there: nan in gradient unused.weight" in caplog.text
    assert "fault strikes: nan in gradient 0.weight" in caplog.text
    assert "fault strikes: nan in gradient unused.weight" not in caplog.text


def test_a_batch_in_which_nothing_can_be_bad_is_refused_on_every_rank() -> None:
    tokens: Batch = {"inputs": torch.ones(1, 3, dtype=torch.int64)}
    fault = FaultConfig(step=0, target="batch")
    for rank in (0, 1):
        with pytest.raises(ConfigError, match=r"inputs \(int64\).*target: activation"):
            FaultInjector([fault], model=network(), rank=rank, sample=lambda: tokens)
    FaultInjector([fault], model=network(), rank=0, sample=lambda: {**tokens, "x": torch.ones(1)})


def test_a_batch_fault_strikes_the_first_floating_tensor_at_any_depth() -> None:
    batch: Any = {
        "name": ["a", "b"],
        "ids": torch.ones(2, dtype=torch.int64),
        "more": {"x": [torch.ones(2)]},
        "y": torch.ones(2),
    }
    fault = FaultConfig(step=0, target="batch")
    for sample in ({"name": ["a"], "count": 3}, {"name": ["a"], "ids": batch["ids"]}):
        with pytest.raises(ConfigError, match=r"name \(list\)"):
            FaultInjector([fault], model=network(), rank=0, sample=lambda sample=sample: sample)  # type: ignore[misc]
    injector = FaultInjector([fault], model=network(), rank=0, sample=lambda: batch)
    with injector.armed(0, 0, batch):
        pass
    assert batch["more"]["x"][0].isnan().tolist() == [True, False]
    assert (batch["name"], batch["y"].tolist()) == (["a", "b"], [1.0, 1.0])


def test_a_run_that_is_read_again_may_have_had_more_steps() -> None:
    parse_arguments(["--faults=[{step: 400}]"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--faults=[{step: 400}]"], r"faults.step is 400: the run's steps are 0 to 399"),
        (["--faults=[{step: 1, micro_batch: 2}]", "--loop.micro_batch=4"], "faults.micro_batch is 2"),
        (["--faults=[{step: 1, micro_batch: 1}]"], "faults.micro_batch is 1"),
        (["--faults=[{step: 1, rank: 2}]"], "faults.rank is 2"),
    ],
)
def test_a_fault_that_cannot_strike_is_refused_before_the_run(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_arguments(arguments).check_world(2)


def test_faults_of_ranks_that_are_gone_after_a_shrink_are_told_once_and_strike_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = parse_arguments(
        [
            "--faults=[{step: 1, rank: 2}, {step: 2, rank: 1}, {step: 3, micro_batch: 1}]",
            "--loop.micro_batch=4",
            "--loop.global_batch=8",
        ]
    )
    config.check_world(2, may_be_uneven=True)
    assert [fault.step for fault in possible_faults(config, rank=1, world_size=2)] == [2]
    assert caplog.text == ""
    possible_faults(config, rank=0, world_size=2)
    assert "there are only 2 ranks: nan in gradient of rank 2, step 1" in caplog.text
    assert "a step has 1 on each rank, counted from 0: nan in gradient of rank 0, step 3" in caplog.text
    assert [fault.step for fault in possible_faults(config, rank=0, world_size=1)] == [3]


def test_a_run_that_goes_on_has_earlier_faults_behind_it(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    injector = FaultInjector([FaultConfig(step=3), FaultConfig(step=5)], model=model, rank=0)
    injector.begin_at(4)
    assert "fault is past, 4 steps are done: nan in gradient of rank 0, step 3" in caplog.text
    run(model, injector, 3)
    assert bad_parameters(model) == []
    run(model, injector, 5)
    assert bad_parameters(model) != []
