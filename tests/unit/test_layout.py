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


def test_rows_follow_the_forward_order_and_leave_out_shared_and_frozen_parameters() -> None:
    layout = Layout.of(tied_model().named_parameters(remove_duplicate=False))
    assert layout.names == ("embed.weight", "head.bias")
    assert layout.sizes == (15, 5)
    assert len(layout) == 2


def test_parameters_of_a_bucket_find_their_rows_in_any_order() -> None:
    model = tied_model()
    layout = Layout.of(model.named_parameters())
    assert layout.rows([model["head"].bias, model["head"].weight]) == [1, 0]


def test_a_parameter_that_came_later_is_named_by_its_shape() -> None:
    layout = Layout.of(tied_model().named_parameters())
    with pytest.raises(ConfigError, match=r"\(7, 2\)"):
        layout.rows([nn.Parameter(torch.zeros(7, 2))])
