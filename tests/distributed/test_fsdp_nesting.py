"""However lists are nested in a model, FSDP2 gives the gradients of one process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from harness.config import ParallelConfig
from harness.dist import World, distribute
from harness.stability import StepGuard
from tests.support.distributed import run_ranks

DIM = 6


class Experts(nn.Module):
    """A block of four experts. Only those are called to which a token goes, others on other ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU()) for _ in range(4))
        self.extra = nn.ModuleDict({"gate": nn.Linear(DIM, 1), "unused": nn.ModuleList()})

    def forward(self, x: Tensor) -> Tensor:
        wanted = x[:, 0].detach().abs().mul(7).long() % 4
        y = self.norm(x)
        out = torch.zeros_like(y)
        for number in wanted.unique().tolist():
            out = out.index_add(
                0, (wanted == number).nonzero()[:, 0], self.experts[number](y[wanted == number])
            )
        return x + out * self.extra["gate"](y).sigmoid()


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Experts() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return functools.reduce(lambda y, layer: layer(y), self.layers, x)


class ListsOfLists(nn.Module):
    """Lists that cannot be called, elements without parameters, and one that stands in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(DIM, DIM)
        self.stages = nn.ModuleList(
            nn.ModuleList([nn.Linear(DIM, DIM), nn.Tanh(), self.shared]) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            for layer in stage:  # type: ignore[attr-defined]
                x = layer(x)
        return x


class Named(nn.Module):
    """As nanoGPT names its parts, with a weight that stands in the dictionary and outside."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(
            {"first": nn.Linear(DIM, DIM), "h": nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(2))}
        )
        self.heads = nn.ModuleList([nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)])
        self.heads[0].weight = self.parts["first"].weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.parts["first"](x)
        for block in self.parts["h"]:  # type: ignore[attr-defined]
            x = torch.tanh(block(x))
        return self.heads[0](x) + self.heads[1](x)  # type: ignore[no-any-return]


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "experts": (Mixture, ["", "layers.0", "layers.1"]),
    "lists of lists": (ListsOfLists, ["", "shared", "stages.0.0", "stages.1.0"]),
    "named parts": (Named, ["", "heads.1", "parts.h.0", "parts.h.1"]),
}


def batch(rank: int) -> Tensor:
    return torch.randn(3, DIM, generator=torch.Generator().manual_seed(rank))


def shard(rank: int, world_size: int, name: str) -> tuple[list[str], dict[str, Any], list[str | None]]:
    """The units, the gradients of the first step, and the guard's reasons over three."""
    torch.manual_seed(0)
    world = World(rank=rank, local_rank=rank, world_size=world_size, device=torch.device("cpu"))
    model = distribute(MODELS[name][0](), ParallelConfig(strategy="fsdp"), world)
    units = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    guard = StepGuard(model, optimizer, max_norm=None)
    gradients: dict[str, Any] = {}
    for step in range(3):
        loss = model(batch(rank + 2 * step)).square().mean()
        loss.backward()
        if step == 0:
            gradients = {n: p.grad.full_tensor().clone() for n, p in model.named_parameters()}  # type: ignore[union-attr]
        guard.step(loss)
        optimizer.zero_grad()
    return sorted(units), gradients, [record.reason for record in guard.drain(wait=True)]


@pytest.mark.parametrize("name", MODELS)
def test_nested_lists_are_sharded_and_give_the_same_gradients(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name][0]()
    sum(model(batch(rank)).square().mean() / 2 for rank in range(2)).backward()  # type: ignore[union-attr]
    for units, gradients, reasons in run_ranks(shard, 2, name):
        assert units == MODELS[name][1]
        assert reasons == [None] * 3
        for key, parameter in model.named_parameters():
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(gradients[key], expected, rtol=1e-5, atol=1e-6)
