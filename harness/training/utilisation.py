"""How much of what the devices could compute the training uses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

from harness.data import Task
from harness.dist import World

__all__ = ["Utilisation", "peak_flops", "utilisation_of"]

# Dense bf16 operations per second, from NVIDIA's data sheets; the longest name that fits counts.
_PEAKS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L4": 121e12,
    "L40S": 362e12,
}


@dataclass(frozen=True, slots=True)
class Utilisation:
    """At one token per second, over all ranks (PaLM, arXiv 2204.02311, appendix B)."""

    mfu: float
    """Of the operations that the model asks for."""
    hfu: float
    """Of those that the hardware makes: with what activation checkpointing computes again."""


def utilisation_of(task: Task, *, recomputes_blocks: bool, world: World) -> Utilisation | None:
    """What a speed of one token per second means; None: operations or the device's peak are not known.

    Args:
        task: Its model as it is trained, checkpointed or not.
        recomputes_blocks: Checkpointed modules keep none of their matrix products.
    """
    peak = peak_flops(world.device)
    if not task.flops_per_token or not peak:
        return None
    mfu = task.flops_per_token / (peak * world.world_size)
    return Utilisation(mfu, mfu * (1 + (recomputed_frac(task.model) if recomputes_blocks else 0.0)))


def recomputed_frac(model: nn.Module) -> float:
    """Operations of the checkpointed modules' forward passes, over those of the model in both passes.

    By their parameters: a forward pass is a third of both. Embeddings that are only looked up cost nothing.
    """
    multiplied: set[nn.Parameter] = set()
    again: set[nn.Parameter] = set()
    for module in model.modules():
        if not isinstance(module, nn.Embedding):
            multiplied.update(module.parameters(recurse=False))
        if isinstance(module, CheckpointWrapper):
            again.update(module.parameters())
    return _size(again) / max(1, _size(multiplied)) / 3


def _size(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def peak_flops(device: torch.device) -> float | None:
    """Peak operations per second of `device` in bf16; None where it is not known, as on CPUs."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = [key for key in _PEAKS if key in name]
    return _PEAKS[max(known, key=len)] if known else None
