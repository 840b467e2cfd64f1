from __future__ import annotations

import pytest
import torch
from torch import nn

from harness.errors import ConfigError
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
