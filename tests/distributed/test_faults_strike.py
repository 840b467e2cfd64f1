"""A rehearsed fault strikes its rank in its micro-batch and no other, however the model is spread, compiled
or checkpointed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from harness.config import FaultConfig, ParallelConfig
from harness.data import LossSum
from harness.dist import World, distribute, gradient_sync, plain
from harness.training.faults import FaultInjector
from tests.support.distributed import run_ranks

FAULTS: list[dict[str, Any]] = [
    {"target": "gradient", "parameter": "blocks.0.inner.0.weight"},
    {"target": "gradient", "parameter": "head.bias"},
    {"target": "activation", "parameter": "blocks.1"},
    {"target": "activation", "parameter": "blocks.0.inner.1"},
    {"target": "loss"},
    {"target": "batch"},
]


class Block(nn.Module):
    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        self.checkpointed = checkpointed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.checkpointed:
            return x + checkpoint(self.inner, x, use_reentrant=False)  # type: ignore[no-any-return]
        return x + self.inner(x)  # type: ignore[no-any-return]


class Network(nn.Module):
    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(checkpointed) for _ in range(2))
        self.head = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


def strike_all(rank: int, world_size: int, strategy: str, compiled: bool, checkpointed: bool) -> list[str]:
    """Runs every fault in a step of its own, two micro-batches long; what was not as it should be."""
    faults = [
        FaultConfig(step=2 * number, rank=number % world_size, micro_batch=(number // 2) % 2, **fault)
        for number, fault in enumerate(FAULTS)
    ]
    network = Network(checkpointed)
    injector = FaultInjector(faults, model=network, rank=rank)
    if compiled:
        network.compile(backend="eager")
    world = World(rank=rank, local_rank=rank, world_size=world_size, device=torch.device("cpu"))
    model = distribute(network, ParallelConfig(strategy=strategy), world)  # type: ignore[arg-type]
    wrong = []
    for step in range(2 * len(faults)):
        bad = _step(model, injector, step, rank)
        if bad != (step % 2 == 0):
            wrong.append(f"step {step}: {faults[step // 2] if step % 2 == 0 else 'no fault'}, bad: {bad}")
    return wrong


def _step(model: nn.Module, injector: FaultInjector, step: int, rank: int) -> bool:
    """Whether any rank's loss or reduced gradient is bad."""
    bad = torch.zeros(())
    for micro_batch in range(2):
        batch = {
            "x": torch.randn(3, 4, generator=torch.Generator().manual_seed(step * 4 + micro_batch * 2 + rank))
        }
        with injector.armed(step, micro_batch, batch), gradient_sync(model, on=micro_batch == 1):
            total = model(batch["x"]).square().sum()
            loss = injector.on_loss(LossSum(total, torch.tensor(3), torch.tensor(0))).total
            loss.backward()
            bad += not loss.isfinite()
    for parameter in plain(model).parameters():
        gradient = parameter.grad
        assert gradient is not None
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        bad += not local.isfinite().all()
    model.zero_grad()
    torch.distributed.all_reduce(bad)
    return bool(bad)


@pytest.mark.parametrize(
    ("strategy", "compiled", "checkpointed"),
    [("ddp", False, False), ("ddp", True, True), ("fsdp", False, True), ("fsdp", True, False)],
)
def test_every_fault_strikes(strategy: str, compiled: bool, checkpointed: bool) -> None:
    assert run_ranks(strike_all, 2, strategy, compiled, checkpointed) == [[], []]
