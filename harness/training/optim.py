"""The optimizers and their parameter groups."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from harness import env
from harness.config import MuonConfig, OptimConfig
from harness.errors import ConfigError
from harness.stability.triton_adamw import TritonAdamW
from harness.training.muon import build_muon, hidden_matrices

__all__ = ["build_optimizers", "set_learning_rate"]

LR_RATIO = "lr_ratio"
"""Key of a parameter group: its learning rate, by the schedule's."""


def build_optimizers(
    model: nn.Module, config: OptimConfig, muon: MuonConfig | None = None, *, is_sharded: bool
) -> dict[str, Optimizer]:
    """The optimizers over the trainable parameters of `model`, which is distributed already, by the names
    under which a checkpoint keeps them: `optimizer`, and with Muon `muon` for the hidden matrices.

    Matrices are decayed; norms, biases and everything else with fewer than two dimensions are not.

    Args:
        is_sharded: The run's parameters are sharded by FSDP2. A replay of it holds them whole, and takes the
            same arithmetic.

    Raises:
        ConfigError: Muon for a model without hidden matrices; Triton's kernel where it cannot run.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if config.name != "muon":
        return {"optimizer": _fused(_groups(trainable, config), config, is_sharded=is_sharded)}
    muon = muon or MuonConfig()
    matrices = hidden_matrices(model, exclude=muon.exclude)
    by_muon = set(map(id, matrices))
    rest = [p for p in trainable if id(p) not in by_muon]
    stepped = {"optimizer": _fused(_groups(rest, config), config, is_sharded=is_sharded)} if rest else {}
    of_matrices = build_muon(matrices, muon, config)
    for group in of_matrices.param_groups:
        group[LR_RATIO] = group["lr"] / config.lr
    return {**stepped, "muon": of_matrices}


def set_learning_rate(optimizers: Iterable[Optimizer], lr: float) -> None:
    """Sets the learning rate of every group, in its ratio to `lr`, which is the schedule's."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get(LR_RATIO, 1.0)


def _groups(trainable: list[nn.Parameter], config: OptimConfig) -> list[dict[str, object]]:
    matrices, vectors = [p for p in trainable if p.dim() >= 2], [p for p in trainable if p.dim() < 2]
    decayed: dict[str, object] = {"params": matrices, "weight_decay": config.weight_decay}
    return [
        *([decayed] if matrices else []),
        *([{"params": vectors, "weight_decay": 0.0}] if vectors else []),
    ]


def _fused(groups: list[dict[str, object]], config: OptimConfig, *, is_sharded: bool) -> Optimizer:
    """Fused, because only fused optimizers take the guard's verdict on the device; but torch has no fused SGD
    and Adagrad for sharded parameters, and no fused Adagrad on CUDA before 2.13: there the guard
    synchronises."""
    if config.name == "sgd":
        return SGD(groups, lr=config.lr, momentum=config.momentum, fused=not is_sharded)
    if config.name == "adagrad":
        fused = not is_sharded and (not _are_on_cuda(groups) or _torch_release() >= (2, 13))
        return Adagrad(groups, lr=config.lr, eps=config.eps, fused=fused)
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.fused == "triton":
        _require_triton(groups)
        return TritonAdamW(groups, **settings)
    kind = Adam if config.name == "adam" else AdamW
    return kind(groups, fused=True, **settings)


def _require_triton(groups: list[dict[str, object]]) -> None:
    # In the interpreter of Triton the kernel runs on the CPU, for tests.
    if importlib.util.find_spec("triton") is None or not (_are_on_cuda(groups) or env.interprets_triton()):
        raise ConfigError(
            "optim.fused is triton, and there is no CUDA device or no package triton",
            rule="the kernel is compiled for CUDA",
            remedy="--optim.fused torch",
        )


def _are_on_cuda(groups: list[dict[str, object]]) -> bool:
    return any(p.is_cuda for group in groups for p in group["params"])  # type: ignore[attr-defined]


def _torch_release() -> tuple[int, int]:
    """Major and minor version, as numbers: as text 2.9 is greater than 2.13."""
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)
