"""The manifest: what a checkpoint consists of, as JSON that carries its own checksum.

A checkpoint exists when its manifest does. One damaged byte of it is noticed: the file is exactly
`{"xxh3_128":"<digest>","manifest":<body>}` and a newline, with the digest taken over the body's bytes.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import xxhash

from harness.errors import CheckpointError
from harness.runlog.paths import MANIFEST

__all__ = ["Chunk", "Damaged", "Manifest", "ShardFile", "TensorInfo"]

FORMAT_VERSION = 1

_HEAD, _MIDDLE, _TAIL = b'{"xxh3_128":"', b'","manifest":', b"}\n"
_DIGEST_LENGTH = 32
_SHARD_NAME = re.compile(r"rank-\d{5}\.safetensors")


class Damaged(CheckpointError):
    """A file of a checkpoint is missing, unreadable, or not as it was written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A rectangular part of a tensor: where it lies in the tensor, and where in which file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    """Byte in the file at which the elements begin, in row-major order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """A whole tensor, which may lie in several chunks and files."""

    dtype: str
    """As torch writes it, without `torch.`."""
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise CheckpointError(f"the checkpoint holds the dtype {self.dtype!r}, unknown to this torch")
        return dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFile:
    """A file of tensor data, as it was when it was written."""

    size_bytes: int
    xxh3_128: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything about a checkpoint but its tensors' elements."""

    step: int
    world_size: int
    created: float
    """Unix time of the commit."""
    metric: float | None
    meta: dict[str, Any]
    """What the caller gave along: plain JSON data."""
    versions: dict[str, str]
    files: dict[str, ShardFile]
    tensors: dict[str, TensorInfo]
    state: dict[str, Any]
    """By key of the saved state: its description, with tensors by name."""
    rank_state: dict[str, list[Any]] = field(default_factory=dict)
    """The same for state that every rank has for itself, by rank."""
    version: int = FORMAT_VERSION

    def to_bytes(self) -> bytes:
        """The file's content."""
        body = json.dumps(_fields(self), separators=(",", ":"), allow_nan=False, default=_fields).encode()
        return b"".join([_HEAD, _digest(body), _MIDDLE, body, _TAIL])

    @classmethod
    def from_bytes(cls, content: bytes) -> Manifest:
        """Reads and checks a manifest.

        Raises:
            Damaged: it is not as it was written, or describes files that cannot be.
            CheckpointError: it is of another format version.
        """
        body = _verified_body(content)
        try:
            values = json.loads(body)
            if values["version"] != FORMAT_VERSION:
                raise CheckpointError(
                    f"{MANIFEST} has format version {values['version']!r}",
                    rule=f"this release reads version {FORMAT_VERSION}",
                )
            values["files"] = {name: ShardFile(**file) for name, file in values["files"].items()}
            values["tensors"] = {name: _tensor_info(info) for name, info in values["tensors"].items()}
            manifest = cls(**values)
            manifest._check_files()
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise Damaged(f"{MANIFEST} is not a manifest: {error}") from error
        return manifest

    def _check_files(self) -> None:
        """Names stay inside the checkpoint's folder, and chunks inside their files."""
        sizes = (file.size_bytes for file in self.files.values())
        for number in (self.step, self.world_size, *sizes):
            if type(number) is not int or number < 0:
                raise Damaged(f"{MANIFEST} has {number!r} where there is a count")
        for name in self.files:
            if not _SHARD_NAME.fullmatch(name):
                raise Damaged(f"{MANIFEST} names the file {name!r}", rule="shards are rank-N.safetensors")
        for name, info in self.tensors.items():
            for chunk in info.chunks:
                if not self._is_inside(chunk, info):
                    raise Damaged(f"{MANIFEST} places {name} outside of {chunk.file}")
            # So that no more memory is asked for than there are bytes.
            if sum(math.prod(chunk.sizes) for chunk in info.chunks) != math.prod(info.shape):
                raise Damaged(f"{MANIFEST} has not all of {name}")

    def _is_inside(self, chunk: Chunk, info: TensorInfo) -> bool:
        extents = zip(chunk.offsets, chunk.sizes, info.shape, strict=True)
        if not all(offset >= 0 and size >= 0 and offset + size <= extent for offset, size, extent in extents):
            return False
        end = chunk.start + math.prod(chunk.sizes) * info.torch_dtype.itemsize
        return chunk.start >= 0 and chunk.file in self.files and end <= self.files[chunk.file].size_bytes


def _tensor_info(values: dict[str, Any]) -> TensorInfo:
    chunks = tuple(
        Chunk(
            offsets=tuple(chunk["offsets"]),
            sizes=tuple(chunk["sizes"]),
            file=chunk["file"],
            start=chunk["start"],
        )
        for chunk in values["chunks"]
    )
    return TensorInfo(dtype=values["dtype"], shape=tuple(values["shape"]), chunks=chunks)


def _fields(value: Any) -> dict[str, Any]:
    """As `asdict`, but without its copies: a manifest may place many thousand chunks."""
    return {field.name: getattr(value, field.name) for field in fields(value)}


def _verified_body(content: bytes) -> bytes:
    start = len(_HEAD) + _DIGEST_LENGTH + len(_MIDDLE)
    body = content[start : -len(_TAIL)]
    if content != b"".join([_HEAD, _digest(body), _MIDDLE, body, _TAIL]):
        raise Damaged(f"{MANIFEST} is damaged", rule="its checksum has to be that of its content")
    return body


def _digest(body: bytes) -> bytes:
    return xxhash.xxh3_128_hexdigest(body).encode()
