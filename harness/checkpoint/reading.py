"""A verified checkpoint on disk as a source of state, at any world size: DCP's load planner reshards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
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

from harness.checkpoint.adapters import Adapter, Spec
from harness.checkpoint.manifest import Chunk, Manifest, TensorInfo
from harness.checkpoint.shards import read_elements
from harness.errors import CheckpointError

__all__ = ["OnDisk"]


@dataclass(frozen=True, slots=True)
class OnDisk:
    """The checkpoint in `folder`, whose manifest has been verified."""

    folder: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        """When it was saved."""
        return self.manifest.step

    def donor(self, rank: int) -> int:
        """The saved rank whose own state `rank` takes over."""
        # Where more ranks load than have saved: each starts from some rank's state rather than from none.
        return rank % self.manifest.world_size

    def holds(self, part: Adapter) -> bool:
        """Whether anything was saved under the part's key."""
        return part.key in (self.manifest.rank_state if part.per_rank else self.manifest.state)

    def description(self, part: Adapter, rank: int) -> Any:
        """What was saved under the part's key."""
        manifest = self.manifest
        if part.per_rank and part.key in manifest.rank_state:
            return manifest.rank_state[part.key][self.donor(rank)]
        if not part.per_rank and part.key in manifest.state:
            return manifest.state[part.key]
        kept = sorted({*manifest.state, *manifest.rank_state})
        raise CheckpointError(
            f"the checkpoint of step {self.step} has no {'per-rank ' * part.per_rank}state {part.key!r}",
            rule=f"it holds {', '.join(kept)}",
            remedy="ask for these keys only",
        )

    def spec(self, name: str) -> Spec:
        """Shape and dtype of a whole tensor."""
        info = self.manifest.tensors[name]
        return torch.Size(info.shape), info.torch_dtype

    def read(self, targets: Mapping[str, torch.Tensor]) -> None:
        """Fills `targets`; of a sharded tensor only the local part is read.

        Raises:
            Damaged: a file cannot be read.
        """
        infos = {name: self.manifest.tensors[name] for name in targets}
        # DCP's planner only: its loader reads a format of its own, and from several ranks by collectives.
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(dict(targets), _metadata(infos))
        for item in planner.create_local_plan().items:
            planner.resolve_tensor(item).copy_(self._box(infos[item.storage_index.fqn], item))

    def _box(self, info: TensorInfo, item: ReadItem) -> torch.Tensor:
        """The box of a chunk that `item` asks for. Only the rows that it lies in are read."""
        chunk, dtype = _chunk(info, item), info.torch_dtype
        if not chunk.sizes:
            return read_elements(self.folder / chunk.file, dtype, chunk.start, 1).view(())
        # Rows lie one after the other in the file, so a range of them is one read; what is narrower than
        # a row (a tensor sharded by another dimension) is cut out in memory.
        row = math.prod(chunk.sizes[1:])
        first, num_rows = item.storage_offsets[0], item.lengths[0]
        start = chunk.start + first * row * dtype.itemsize
        rows = read_elements(self.folder / chunk.file, dtype, start, num_rows * row)
        box = rows.view(num_rows, *chunk.sizes[1:])
        for dim in range(1, box.dim()):
            box = box.narrow(dim, item.storage_offsets[dim], item.lengths[dim])
        return box


def _chunk(info: TensorInfo, item: ReadItem) -> Chunk:
    assert item.storage_index.index is not None  # DCP's plans carry the chunk's number
    return info.chunks[item.storage_index.index]


def _metadata(infos: Mapping[str, TensorInfo]) -> Metadata:
    """What DCP's planner needs to know."""
    return Metadata({name: _tensor_metadata(info) for name, info in infos.items()})


def _tensor_metadata(info: TensorInfo) -> TensorStorageMetadata:
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=info.torch_dtype),
        size=torch.Size(info.shape),
        chunks=[
            ChunkStorageMetadata(offsets=torch.Size(chunk.offsets), sizes=torch.Size(chunk.sizes))
            for chunk in info.chunks
        ],
    )
