"""Byte-level language modelling: predict each byte of a text from the bytes before it."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from harness.config import DataConfig
from harness.data.corpus import SourceFile, list_files, prepare, standard_library
from harness.data.origin import Origin
from harness.data.task import IGNORED, Batch, LossSum, cross_entropy
from harness.errors import DataError

__all__ = ["Windows", "load_text", "next_byte_loss", "text_files"]


def text_files(config: DataConfig) -> list[SourceFile]:
    """The files of `config.paths`, or else of the Python standard library's source, as they are now.

    Raises:
        DataError: a path does not exist or cannot be read.
    """
    return list_files(config.paths) if config.paths else standard_library()


def load_text(
    config: DataConfig, *, cache_dir: Path, files: Sequence[SourceFile] | None = None
) -> tuple[Windows, Windows]:
    """Training and validation windows of the text.

    Args:
        cache_dir: Where the prepared text is kept between runs.
        files: As one rank has listed them for all, so that one which grows meanwhile is the same for all;
            None: as they are now.

    Raises:
        DataError: the text is missing, unreadable, too short, or cannot be prepared.
    """
    length = config.sequence_length
    files = text_files(config) if files is None else files
    where = ", ".join(config.paths) or "the standard library"
    _require_length(sum(file.num_bytes for file in files), length, f"the text in {where}")
    corpus = prepare(files, val_frac=config.val_frac, cache_dir=cache_dir)
    _require_length(corpus.train.path.stat().st_size, length, "the training part of the text")
    return (
        Windows(corpus.train.path, length, digest=corpus.train.digest, origin=corpus.train.origin),
        Windows(corpus.val.path, length, digest=corpus.val.digest, origin=corpus.val.origin, keep_rest=True),
    )


def next_byte_loss(model: nn.Module, batch: Batch) -> LossSum:
    """Cross entropy of the next byte in nats, summed over the targets that are not padding."""
    return cross_entropy(model(batch["inputs"]), batch["targets"])


class Windows:
    """Consecutive windows of a file of bytes; each byte but the first is a target exactly once.

    Args:
        path: Raw bytes; mapped into memory when first used, in each process anew.
        length: Bytes per window.
        digest: A hash of them.
        origin: Which files they come from.
        keep_rest: Keep the bytes that do not fill a last window, with its missing targets set to -100. For
            validation, where each byte counts; in training full windows keep the token count constant.
    """

    def __init__(
        self,
        path: Path,
        length: int,
        *,
        digest: str = "",
        origin: Origin | None = None,
        keep_rest: bool = False,
    ) -> None:
        self._path = path
        self._origin = origin
        self._digest = digest
        self._length = length
        self._num_bytes = path.stat().st_size
        num_targets = max(self._num_bytes - 1, 0)
        self._num_windows = math.ceil(num_targets / length) if keep_rest else num_targets // length

    def __len__(self) -> int:
        return self._num_windows

    def fingerprint(self) -> str:
        """Tells the text and its division from any other."""
        return f"{self._length}-{self._digest}"

    def source_of(self, index: int) -> str:
        """`FILE:OFFSET` of a window's first byte, and of the beginnings of further files in it."""
        start = index * self._length
        if self._origin is None:
            return f"{self._path}:{start}"
        return self._origin.describe(start, min(start + self._length, self._num_bytes))

    def index_of(self, source: str) -> int | None:
        """The window with a byte of a file, which may be any of its bytes; None if there is none."""
        return next(iter(self.indices_of([source]).get(source, ())), None)

    def indices_of(self, sources: Collection[str]) -> dict[str, list[int]]:
        """The same of many at once, of those that there are."""
        places = {} if self._origin is None else self._origin.find(sources)
        indices = {source: place // self._length for source, place in places.items()}
        return {source: [index] for source, index in indices.items() if index < len(self)}

    def __getitem__(self, index: int) -> Batch:
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """`inputs` and `targets`, int64 `[len(indices), length]`: target t is the byte after input t."""
        starts = np.asarray(indices, dtype=np.int64)[:, None] * self._length
        places = starts + np.arange(self._length + 1)
        inside = places < self._num_bytes
        window = np.where(inside, self._bytes[np.where(inside, places, 0)].astype(np.int64), IGNORED)
        inputs, targets = window[:, :-1], window[:, 1:]
        return {
            "inputs": torch.from_numpy(np.where(inside[:, :-1], inputs, 0)),
            "targets": torch.from_numpy(targets.copy()),
        }

    @cached_property
    def _bytes(self) -> NDArray[np.uint8]:
        return np.memmap(self._path, dtype=np.uint8, mode="r")

    def __getstate__(self) -> dict[str, object]:
        # A memory map would be pickled as all of its bytes.
        return {name: value for name, value in vars(self).items() if name != "_bytes"}


def _require_length(num_bytes: int, sequence_length: int, what: str) -> None:
    if num_bytes <= sequence_length:
        raise DataError(
            f"{what} has {num_bytes} bytes",
            rule=f"one sample takes data.sequence_length + 1 = {sequence_length + 1} bytes",
            remedy="add text to --data.paths or lower --data.sequence_length",
        )
