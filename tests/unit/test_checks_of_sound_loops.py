"""What checks for silent errors, on by default, do not disturb and do not call an error."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from harness import StepGuard
from harness.errors import ConfigError
from tests.support.silent_errors import adamw, network, points, square


def gradients_of_samples(model: nn.Module) -> None:
    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, parameters, (x,)).square().sum()

    vmap(grad(loss), in_dims=(None, 0))({n: p.detach() for n, p in model.named_parameters()}, points(0))


def traced(model: nn.Module) -> None:
    torch.jit.trace(model, points(0))


@pytest.mark.parametrize("use", [gradients_of_samples, traced])
def test_a_guarded_model_can_be_transformed_and_traced(use: Callable[[nn.Module], None]) -> None:
    model = network()
    with StepGuard(model, adamw(model)) as guard:
        use(model)
        guard.step(square(model, points(1)))


def test_a_guarded_model_is_not_scripted_until_the_guard_is_closed() -> None:
    model = network()
    with StepGuard(model, adamw(model)) as guard:
        with pytest.raises(ConfigError, match="is guarded"):
            torch.jit.script(model)
        guard.step(square(model, points(0)))
    torch.jit.script(model)
