"""Muon (Jordan et al., 2024) for the hidden matrices of a model: what they are, and their optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from harness.config import MuonConfig, OptimConfig
from harness.dist import ShardedMuon
from harness.errors import ConfigError

__all__ = ["build_muon", "hidden_matrices"]


def hidden_matrices(model: nn.Module, *, exclude: Sequence[str] = ()) -> list[nn.Parameter]:
    """The trainable parameters of two dimensions within the model's blocks, which stand in `ModuleList`s.

    Without embeddings, what is shared with the rest of the model (a tied head), and what `exclude` names.

    Raises:
        ConfigError: there is none.
    """
    inside, outside = _owners(model)
    found = {
        id(parameter): parameter
        for name, parameter in inside
        if parameter.dim() == 2 and parameter.requires_grad and not any(part in name for part in exclude)
    }
    matrices = [parameter for parameter in found.values() if id(parameter) not in outside]
    if not matrices:
        raise ConfigError(
            "optim.name is muon, and the model has no hidden matrices",
            rule="Muon steps trainable two-dimensional weights of blocks that stand in an nn.ModuleList, but "
            "for embeddings and what muon.exclude names",
            remedy="--optim.name adamw",
        )
    return matrices


def build_muon(matrices: Sequence[nn.Parameter], config: MuonConfig, rest: OptimConfig) -> torch.optim.Muon:
    """The optimizer of hidden matrices; what `config` leaves open is as in `rest`."""
    kind = ShardedMuon if isinstance(matrices[0], DTensor) else torch.optim.Muon
    return kind(
        matrices,
        lr=rest.lr if config.lr is None else config.lr,
        weight_decay=rest.weight_decay if config.weight_decay is None else config.weight_decay,
        momentum=config.momentum,
        nesterov=config.nesterov,
        ns_steps=config.ns_steps,
        adjust_lr_fn=config.adjust_lr,
    )


def _owners(model: nn.Module) -> tuple[list[tuple[str, nn.Parameter]], set[int]]:
    """Names and parameters of layers in blocks, and the ids of what embeddings and other layers own."""
    inside: list[tuple[str, nn.Parameter]] = []
    outside: set[int] = set()
    for path, module, is_in_block in _walk(model, "", False):
        owned = [(f"{path}{name}", p) for name, p in module.named_parameters(recurse=False)]
        if is_in_block and not isinstance(module, nn.Embedding):
            inside += owned
        else:
            outside.update(id(p) for _, p in owned)
    return inside, outside


def _walk(module: nn.Module, path: str, is_in_block: bool) -> Iterator[tuple[str, nn.Module, bool]]:
    yield path, module, is_in_block
    for name, child in module.named_children():
        yield from _walk(child, f"{path}{name}.", is_in_block or isinstance(module, nn.ModuleList))
