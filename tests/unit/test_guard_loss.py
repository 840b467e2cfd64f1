"""A loss of one element is a loss in whatever shape it comes; anything else is an error in words."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from harness.errors import ConfigError
from harness.stability import StepGuard
from tests.support.guarded import OPTIMIZERS, batch, make_model

GOOD: dict[str, Callable[[Tensor], Any]] = {
    "0-d": lambda loss: loss,
    "shape [1]": lambda loss: loss[None],
    "shape [1, 1]": lambda loss: loss.view(1, 1),
    "without a graph": lambda loss: loss.detach(),
    "float64": lambda loss: loss.double(),
    "a parameter": lambda loss: torch.nn.Parameter(loss.detach()[None]),
}

BAD: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "unreduced": (lambda loss: loss.expand(5), r"has the shape \[5\].*mean\(\)"),
    "empty": (lambda loss: loss.new_zeros(0), r"has the shape \[0\]"),
    "float": (lambda loss: loss.item(), r"the loss is 0\.\d+: .*not its item\(\)"),
    "NumPy": (lambda loss: loss.detach().numpy(), "the loss is a ndarray"),
    "text": (lambda loss: "0.5", "the loss is '0.5'"),
    "dict": (lambda loss: {"loss": loss}, "the loss is a dict"),
    "output": (lambda loss: SimpleNamespace(loss=loss), r"SimpleNamespace.*outputs\.loss"),
    "tuple": (lambda loss: (loss, loss), "the loss is a tuple"),
    "integer": (lambda loss: torch.tensor(3), r"torch\.int64"),
    "complex": (lambda loss: loss + 0j, r"torch\.complex64"),
    "sparse": (lambda loss: loss[None].to_sparse(), "sparse"),
    "elsewhere": (lambda loss: loss.detach().to("meta"), "lies on meta and the model on cpu"),
}


def _guarded() -> tuple[StepGuard, Tensor]:
    model = make_model()
    guard = StepGuard(model, OPTIMIZERS["adamw"](model.parameters()))
    loss = model(batch(0)[0]).square().mean()
    loss.backward()
    return guard, loss


@pytest.mark.parametrize("name", GOOD)
def test_a_loss_of_one_element_is_a_loss(name: str) -> None:
    guard, loss = _guarded()
    guard.step(GOOD[name](loss))
    assert guard.drain(wait=True)[0].loss == pytest.approx(loss.item())


@pytest.mark.parametrize("call", ["step", "accumulate"])
@pytest.mark.parametrize("name", BAD)
def test_anything_else_is_an_error_after_which_the_step_can_be_taken(name: str, call: str) -> None:
    guard, loss = _guarded()
    make, words = BAD[name]
    with pytest.raises(ConfigError, match=words):
        getattr(guard, call)(make(loss))
    guard.step(loss)
    assert guard.drain(wait=True)[0].loss == pytest.approx(loss.item())


def test_accumulate_without_a_loss_is_an_error() -> None:
    with pytest.raises(ConfigError, match="the loss is None"):
        _guarded()[0].accumulate(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [5, 5.0, np.int64(5), np.float32(5), torch.tensor([5]), torch.tensor(5.0)])
def test_a_count_is_one_number_of_any_kind(count: Any) -> None:
    guard, loss = _guarded()
    guard.accumulate(loss * 5, count, num_correct=count)
    guard.step()
    record = guard.drain(wait=True)[0]
    assert (record.num_tokens, record.num_correct) == (5, 5)
    assert record.loss == pytest.approx(loss.item())


@pytest.mark.parametrize("count", ["5", torch.ones(3), torch.tensor(1j), [5]])
def test_a_count_of_another_kind_is_an_error(count: Any) -> None:
    guard, loss = _guarded()
    with pytest.raises(ConfigError, match="the number of tokens is"):
        guard.accumulate(loss, count)
    with pytest.raises(ConfigError, match="the number predicted right is"):
        guard.accumulate(loss, 1, num_correct=count)
