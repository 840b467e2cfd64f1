"""From live objects to what is to be written: the tensors of this rank, and a description of the rest."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from harness.checkpoint.adapters import Adapter, Soundness, Spec, adapters
from harness.checkpoint.tree import flatten

__all__ = ["Captured", "capture", "prefix_of"]


@dataclass(frozen=True, slots=True)
class Captured:
    """This rank's view of the state. The tensors are the live ones, not copies."""

    live: dict[str, torch.Tensor] = field(default_factory=dict)
    """All tensors."""
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    """Those that this rank offers for saving."""
    specs: dict[str, Spec] = field(default_factory=dict)
    """Shapes and dtypes of all."""
    state: dict[str, Any] = field(default_factory=dict)
    """Descriptions by key; rank 0's are the ones that are saved."""
    rank_state: dict[str, Any] = field(default_factory=dict)
    """Descriptions of what every rank has for itself."""
    checked: dict[str, Soundness] = field(default_factory=dict)
    """What the tensors of models and optimizers have to be."""

    def without_tensors(self) -> Captured:
        """The descriptions alone, which keep nothing alive."""
        return replace(self, live={}, tensors={})


def capture(state: MutableMapping[str, Any], rank: int) -> Captured:
    """Describes `state`. Copies nothing, waits for nothing.

    Raises:
        CheckpointError: something in it cannot be saved.
    """
    parts = adapters(state)
    captured = Captured()
    for part in parts:
        tensors: dict[str, torch.Tensor] = {}
        described = flatten(part.tree(), prefix_of(part, rank), tensors)
        (captured.rank_state if part.per_rank else captured.state)[part.key] = described
        for name, tensor in tensors.items():
            captured.live[name] = tensor.detach()
            captured.specs[name] = (tensor.shape, tensor.dtype)
            soundness = part.soundness(tensor)
            if soundness is not None:
                captured.checked[name] = soundness
            if rank == 0 or part.per_rank or part.is_everywhere(tensor):
                captured.tensors[name] = captured.live[name]
    return captured


def prefix_of(part: Adapter, rank: int) -> str:
    """What the names of `part`'s tensors begin with."""
    return f"{part.key}/rank{rank}" if part.per_rank else part.key
