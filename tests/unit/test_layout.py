from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

from harness.errors import ConfigError
from harness.stability.guard import StepGuard
from harness.stability.layout import Layout


def tied_model() -> nn.Module:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "frozen": nn.Linear(3, 3), "head": nn.Linear(3, 5)})
    model["head"].weight = model["embed"].weight
    model["frozen"].requires_grad_(False)
    return model


def test_rows_follow_the_forward_order_of_what_is_held_and_shared_parameters_have_one() -> None:
    model = tied_model()
    held = [model["head"].bias, model["head"].weight, *model["frozen"].parameters()]
    layout = Layout.of(model.named_parameters(remove_duplicate=False), of=held)
    assert layout.names == ("embed.weight", "frozen.weight", "frozen.bias", "head.bias")
    assert layout.sizes == (15, 9, 3, 5)
    assert [layout.row_of[id(p)] for p in held] == [3, 0, 1, 2]


def test_a_parameter_that_is_not_the_models_is_named_by_its_shape() -> None:
    with pytest.raises(ConfigError, match=r"1 parameters that are not the model's, of shapes \(7, 2\)"):
        Layout.of(tied_model().named_parameters(), of=[nn.Parameter(torch.zeros(7, 2))])


class WithMasters(torch.optim.Optimizer):
    """Steps fp32 copies of a bf16 model's parameters, as Apex did, and copies them back."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.models = list(parameters)
        self.masters = [nn.Parameter(parameter.detach().float()) for parameter in self.models]
        self.inner = torch.optim.AdamW(self.masters)
        super().__init__(self.masters, {})

    def step(self, closure: Any = None) -> None:
        self.inner.step()


def test_an_optimizer_of_fp32_masters_is_refused_at_construction() -> None:
    model = nn.Linear(2, 3, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match=r"2 parameters that are not the model's.*fp32 masters") as refused:
        StepGuard(model, WithMasters(model.parameters()))
    assert "(3, 2)" in str(refused.value)


def test_a_guard_that_closes_another_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    model = tied_model()
    first = StepGuard(model, torch.optim.SGD(model.parameters()))
    assert caplog.messages == []
    second = StepGuard(model, torch.optim.SGD(model["head"].parameters()))
    (said,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "an earlier guard is closed: a later one watches embed.weight, head.bias too" in said
    del first, second
