"""Who writes what, by DCP's save planner, and where in its file, by a safetensors layout.

DCP (torch.distributed.checkpoint) knows how plain tensors and DTensors are spread over the ranks: what all
ranks hold is written once, and the writing is spread over them; sharded tensors are written as they lie.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.tensor import DTensor

from harness.checkpoint.manifest import Chunk, TensorInfo
from harness.dist import HostGroup

__all__ = ["Part", "SavePlanning", "ShardLayout", "plan_files", "shard_name"]

_ALIGNMENT = 64
_SAFETENSORS_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One rank's share of one tensor, and where its bytes lie in the rank's data."""

    tensor: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int = 0
    """Byte in the rank's data, not counting the file's header."""

    @property
    def size_bytes(self) -> int:
        """Bytes of the elements."""
        return math.prod(self.sizes) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardLayout:
    """What one rank writes, in the order in which it writes it."""

    parts: tuple[Part, ...]

    @classmethod
    def of(cls, parts: Iterable[Part]) -> ShardLayout:
        """Puts the parts one after the other without gaps, wide elements first, so that all are aligned."""
        placed, start = [], 0
        for part in sorted(parts, key=lambda part: -part.dtype.itemsize):
            placed.append(replace(part, start=start))
            start += part.size_bytes
        return cls(parts=tuple(placed))

    @property
    def size_bytes(self) -> int:
        """Bytes of all parts, without the header."""
        return sum(part.size_bytes for part in self.parts)

    @property
    def header(self) -> bytes:
        """The safetensors header: length, JSON, and blanks up to an aligned end."""
        entries = {}
        for part in self.parts:
            whole = part.sizes == part.shape
            name = part.tensor if whole else f"{part.tensor}@{','.join(map(str, part.offsets))}"
            dtype = _SAFETENSORS_DTYPES.get(part.dtype)
            entries[name] = {
                "dtype": dtype or "U8",
                "shape": part.sizes if dtype else (part.size_bytes,),
                "data_offsets": (part.start, part.start + part.size_bytes),
            }
        text = json.dumps(entries, separators=(",", ":")).encode()
        length = -(-(8 + len(text)) // _ALIGNMENT) * _ALIGNMENT - 8
        return length.to_bytes(8, "little") + text.ljust(length)


class SavePlanning:
    """Plans who writes what, once for each set of names, shapes and placements."""

    def __init__(self, group: HostGroup) -> None:
        self._group = group
        self._signature: object = None
        self._mine = ShardLayout(parts=())
        self._infos: dict[str, TensorInfo] = {}

    def update(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Makes a new plan if one is needed on any rank. A collective.

        Raises:
            CheckpointError: the ranks' tensors do not fit together.
        """
        current = _signature_of(tensors)
        if not any(self._group.gather(lambda: current != self._signature)):
            return
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(dict(tensors), is_coordinator=self._group.is_main)
        local = self._group.on_all_ranks(planner.create_local_plan)
        self._mine = self._group.through_main(local, lambda plans: self._plan_all(planner, plans))
        self._signature = current

    @property
    def mine(self) -> ShardLayout:
        """What this rank writes."""
        return self._mine

    def tensor_infos(self) -> dict[str, TensorInfo]:
        """Where every tensor lies; known on rank 0 only, empty on the others."""
        return self._infos

    def _plan_all(self, planner: DefaultSavePlanner, plans: list[SavePlan]) -> list[ShardLayout]:
        layouts, self._infos = plan_files(planner, plans)
        return layouts


def plan_files(
    planner: DefaultSavePlanner, plans: list[SavePlan]
) -> tuple[list[ShardLayout], dict[str, TensorInfo]]:
    """From what each rank offers to what each writes, and where all tensors lie then."""
    final, _ = planner.create_global_plan(plans)
    layouts = [ShardLayout.of(_parts(plan)) for plan in final]
    return layouts, _tensor_infos(layouts)


def shard_name(rank: int) -> str:
    """The file that `rank` writes."""
    return f"rank-{rank:05d}.safetensors"


def _signature_of(tensors: Mapping[str, torch.Tensor]) -> object:
    """All that a plan depends on: names, shapes, dtypes, placements."""
    return tuple((name, tensor.shape, tensor.dtype, *_placement(tensor)) for name, tensor in tensors.items())


def _tensor_infos(layouts: list[ShardLayout]) -> dict[str, TensorInfo]:
    chunks: dict[str, list[Chunk]] = {}
    parts: dict[str, Part] = {}
    for rank, layout in enumerate(layouts):
        file, data_start = shard_name(rank), len(layout.header)
        for part in layout.parts:
            chunk = Chunk(offsets=part.offsets, sizes=part.sizes, file=file, start=data_start + part.start)
            chunks.setdefault(part.tensor, []).append(chunk)
            parts[part.tensor] = part
    return {name: _tensor_info(parts[name], found) for name, found in chunks.items()}


def _tensor_info(part: Part, chunks: list[Chunk]) -> TensorInfo:
    dtype = str(part.dtype).removeprefix("torch.")
    return TensorInfo(dtype=dtype, shape=part.shape, chunks=tuple(chunks))


def _placement(tensor: torch.Tensor) -> tuple[object, ...]:
    return (tensor.placements, tensor.device_mesh) if isinstance(tensor, DTensor) else ()


def _parts(plan: SavePlan) -> list[Part]:
    parts = []
    for item in plan.items:
        data = item.tensor_data
        assert data is not None  # only tensors are planned for
        parts.append(
            Part(
                tensor=item.index.fqn,
                dtype=data.properties.dtype,
                shape=tuple(data.size),
                offsets=tuple(data.chunk.offsets),
                sizes=tuple(data.chunk.sizes),
            )
        )
    return parts
