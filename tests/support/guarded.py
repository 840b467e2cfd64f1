"""A small model, its data and its guarded steps, for the tests of the guard."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["OPTIMIZERS", "batch", "make_model", "snapshot", "worst_difference"]

OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-1, momentum=0.9, dampening=0.1, fused=True),
    "sgd-plain": lambda parameters: torch.optim.SGD(parameters, lr=1e-1, fused=True),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=1e-2, fused=True),
    "adamw-foreach": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, foreach=True),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3),
}


def make_model(seed: int = 0, width: int = 8) -> nn.Sequential:
    """Three linear layers, float32, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def batch(step: int, rank: int = 0, micro_batch: int = 0, size: int = 5) -> tuple[Tensor, Tensor]:
    """Inputs `[size, 4]` and targets `[size, 1]`, a function of the arguments alone."""
    generator = torch.Generator().manual_seed(step * 10_007 + rank * 101 + micro_batch)
    return torch.randn(size, 4, generator=generator), torch.randn(size, 1, generator=generator)


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of all parameters and of all tensors of the optimizer's state, by name."""
    values = {name: _local(p).clone() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                values[f"{name}/{key}"] = _local(value).clone()
    return values


def worst_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> str:
    """Name of the first entry that differs in a bit or is there only once; empty if all are the same."""
    for name in sorted(one.keys() | other.keys()):
        if name not in one or name not in other or not torch.equal(one[name], other[name]):
            return name
    return ""


def _local(tensor: Tensor) -> Tensor:
    return getattr(tensor, "_local_tensor", tensor).detach()
