"""From a verified checkpoint back into live objects, at any world size: DCP's load planner reshards."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from harness.checkpoint.adapters import Adapter, adapters
from harness.checkpoint.capture import prefix_of
from harness.checkpoint.manifest import Chunk, Manifest, TensorInfo
from harness.checkpoint.shards import read_elements
from harness.checkpoint.tree import fill, flatten, tensor_names
from harness.errors import CheckpointError

__all__ = ["Restore", "read_tensors"]

_UNFIT = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What an object's `load_state_dict` may raise on state that is not its own."""


class Restore:
    """One checkpoint on its way into `state`. Making it compares the two and touches neither.

    Raises:
        CheckpointError: the checkpoint is of another model, or lacks a key of `state`.
    """

    def __init__(self, manifest: Manifest, state: MutableMapping[str, Any], rank: int) -> None:
        self._manifest, self._rank = manifest, rank
        self._donor = rank % manifest.world_size
        self._parts = adapters(state)
        self._described = {part.key: self._description(part) for part in self._parts}
        self._targets: dict[str, torch.Tensor] = {}
        for part in self._parts:
            self._targets.update(self._targets_of(part))

    def read(self, folder: Path) -> None:
        """Reads this rank's share. From here on live parameters and optimizer state change.

        Raises:
            Damaged: a file cannot be read.
        """
        read_tensors(folder, self._manifest.tensors, self._targets)

    def apply(self) -> None:
        """Hands every object its state.

        Raises:
            CheckpointError: an object refuses it.
        """
        for part in self._parts:
            try:
                part.restore(fill(self._described[part.key], self._targets))
                if self._rank != self._donor and part.per_rank and hasattr(part.value, "diverge"):
                    part.value.diverge(self._rank)
            except _UNFIT as error:
                raise CheckpointError(
                    f"{part.key} refuses its state of step {self._manifest.step}: {error}",
                    rule="it has to be of the kind that was saved under this key",
                ) from error

    def _description(self, part: Adapter) -> Any:
        manifest = self._manifest
        if part.per_rank and part.key in manifest.rank_state:
            return manifest.rank_state[part.key][self._donor]
        if not part.per_rank and part.key in manifest.state:
            return manifest.state[part.key]
        kept = sorted({*manifest.state, *manifest.rank_state})
        raise CheckpointError(
            f"the checkpoint of step {manifest.step} has no {'per-rank ' * part.per_rank}state {part.key!r}",
            rule=f"it holds {', '.join(kept)}",
            remedy="ask for these keys only",
        )

    def _targets_of(self, part: Adapter) -> dict[str, torch.Tensor]:
        described = self._described[part.key]
        saved_prefix, live_prefix = prefix_of(part, self._donor), prefix_of(part, self._rank)
        tensors: dict[str, torch.Tensor] = {}
        flatten(part.tree(), live_prefix, tensors)
        live = {name.removeprefix(live_prefix).lstrip("/"): tensor for name, tensor in tensors.items()}
        names = {name.removeprefix(saved_prefix).lstrip("/"): name for name in tensor_names(described)}
        saved = {place: self._spec(name) for place, name in names.items()}
        part.check(described, saved, live)
        return {names[place]: part.target(place, live.get(place), *spec) for place, spec in saved.items()}

    def _spec(self, name: str) -> tuple[torch.Size, torch.dtype]:
        info = self._manifest.tensors[name]
        return torch.Size(info.shape), info.torch_dtype


def read_tensors(
    folder: Path, infos: Mapping[str, TensorInfo], targets: MutableMapping[str, torch.Tensor]
) -> None:
    """Fills `targets` (plain tensors and DTensors, anywhere) with what `folder` holds under their names.

    Raises:
        Damaged: a file cannot be read.
    """
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(targets), _metadata({name: infos[name] for name in targets}))
    for item in planner.create_local_plan().items:
        chunk = _chunk(infos[item.storage_index.fqn], item)
        dtype = infos[item.storage_index.fqn].torch_dtype
        planner.resolve_tensor(item).copy_(_read(folder, chunk, dtype, item))


def _read(folder: Path, chunk: Chunk, dtype: torch.dtype, item: ReadItem) -> torch.Tensor:
    """The box of a chunk that `item` asks for. Only the rows that it lies in are read."""
    path = folder / chunk.file
    if not chunk.sizes:
        return read_elements(path, dtype, chunk.start, 1).view(())
    row = math.prod(chunk.sizes[1:])
    first, num_rows = item.storage_offsets[0], item.lengths[0]
    rows = read_elements(path, dtype, chunk.start + first * row * dtype.itemsize, num_rows * row)
    box = rows.view(num_rows, *chunk.sizes[1:])
    for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
        if dim > 0:
            box = box.narrow(dim, offset, length)
    return box


def _chunk(info: TensorInfo, item: ReadItem) -> Chunk:
    assert item.storage_index.index is not None  # DCP's plans carry the chunk's number
    return info.chunks[item.storage_index.index]


def _metadata(infos: Mapping[str, TensorInfo]) -> Metadata:
    """What DCP's planner needs to know."""
    return Metadata(
        {
            name: TensorStorageMetadata(
                properties=TensorProperties(dtype=info.torch_dtype),
                size=torch.Size(info.shape),
                chunks=[
                    ChunkStorageMetadata(offsets=torch.Size(chunk.offsets), sizes=torch.Size(chunk.sizes))
                    for chunk in info.chunks
                ],
            )
            for name, info in infos.items()
        }
    )
