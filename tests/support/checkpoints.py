"""A small training that checkpoint tests save, kill, damage and resume; the same on any number of ranks."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from harness.checkpoint import Rng

__all__ = ["TinyRun", "digest", "whole"]

GLOBAL_BATCH = 12
"""Divisible by the world sizes 1, 2, 3 and 4."""


class TinyModel(nn.Module):
    """Uneven shapes, a tied weight, a buffer, dropout: what makes sharding and resuming hard."""

    def __init__(self, width: int = 7, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = self.drop(torch.tanh(block(hidden)))
        return self.head(hidden)


class TinyRun:
    """Model, optimizer and position of a run whose global batches depend on the step alone."""

    def __init__(
        self, kind: str, rank: int = 0, world_size: int = 1, *, dropout: float = 0.0, seed: int = 0
    ) -> None:
        torch.manual_seed(seed)
        model = TinyModel(dropout=dropout)
        if kind in ("fsdp", "hsdp"):
            shape = (1, world_size) if kind == "fsdp" else (2, world_size // 2)
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
            mesh = mesh["shard"] if kind == "fsdp" else mesh
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        self.model = DistributedDataParallel(model) if kind == "ddp" else model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05, fused=True)
        self.step, self.rank, self.world_size = 0, rank, world_size
        torch.manual_seed(100 + rank)

    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "rng": Rng(), "run": self}

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]

    def train(self, num_steps: int) -> None:
        for _ in range(num_steps):
            generator = torch.Generator().manual_seed(self.step)
            tokens = torch.randint(11, (GLOBAL_BATCH, 5), generator=generator)
            mine = tokens[self.rank :: self.world_size]
            loss = nn.functional.cross_entropy(self.model(mine).flatten(0, 1), mine.flatten())
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1


def whole(run: TinyRun) -> dict[str, torch.Tensor]:
    """Parameters, buffers and optimizer state by clean names, unsharded. A collective under FSDP2."""
    module = run.model.module if isinstance(run.model, DistributedDataParallel) else run.model
    names = {param: name for name, param in module.named_parameters()}
    tensors = dict(module.state_dict())
    for param, values in run.optimizer.state.items():
        tensors.update({f"{names[param]}/{key}": value for key, value in values.items()})
    return {name: _full(tensor).detach().clone() for name, tensor in tensors.items()}


def digest(run: TinyRun) -> str:
    """One number for all bits of a run's state, this rank's random numbers included. A collective."""
    checksum = hashlib.sha256()
    for name, tensor in sorted(whole(run).items()):
        checksum.update(name.encode())
        checksum.update(tensor.numpy().tobytes())
    checksum.update(torch.get_rng_state().numpy().tobytes())
    return f"{run.step}:{checksum.hexdigest()}"


def _full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
