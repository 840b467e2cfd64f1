"""The optimizer and its parameter groups."""

from __future__ import annotations

import torch
from torch import nn

from harness.config import OptimConfig

__all__ = ["build_optimizer", "set_learning_rate"]


def build_optimizer(model: nn.Module, config: OptimConfig, *, is_sharded: bool) -> torch.optim.Optimizer:
    """The optimizer over the trainable parameters of `model`, which is distributed already.

    Matrices are decayed; norms, biases and everything else with fewer than two dimensions are not.
    Fused, because only fused optimizers take the guard's verdict on the device; but torch has no fused SGD
    and Adagrad for sharded parameters, and none of Adagrad on CUDA before 2.13; there the guard synchronises.

    Args:
        is_sharded: The run's parameters are sharded by FSDP2. A replay of it holds them whole, and takes the
            same arithmetic.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = not is_sharded
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=fused)
    if config.name == "adagrad":
        fused = fused and (not trainable[0].is_cuda or torch.__version__ >= "2.13")
        return torch.optim.Adagrad(groups, lr=config.lr, eps=config.eps, fused=fused)
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
