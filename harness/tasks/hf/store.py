"""The tokens of a source, all documents after one another in files that are mapped into memory.

They are prepared once per machine and tokenizer; sequence length, packing and split are of the rows, which
`packing` makes of them. Files of a folder:

    tokens.bin    uint16, or uint32 where the vocabulary is larger
    counted.bin   a byte per token: whether it counts in the loss; missing: all do
    ends.bin      int64 per document: one past its last token
    ranks.bin     float64 per document: the hash of its tokens, by which documents are held out
    about.json    digest, dtype, number of bytes of text
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from harness.data.alive import still_working
from harness.data.prepared import prepared_folder, sync_file
from harness.data.split import content_rank
from harness.errors import DataError
from harness.tasks.hf.encode import Encoded, Encoder, text_of
from harness.tasks.hf.readers import Record

__all__ = ["TokenStore", "prepare_tokens"]

logger = logging.getLogger(__name__)

_VERSION = 1
_BATCH = 256
"""Records that are tokenised at once, on all cores."""
_BATCH_CHARS = 4 << 20
"""A batch of so many characters has fewer records; what tokenising needs in memory is a multiple of it."""
_ABOUT = "about.json"


class TokenStore:
    """The documents of one source as they lie on disk; each process maps them anew.

    Args:
        folder: Of `prepare_tokens`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        about = json.loads((folder / _ABOUT).read_bytes())
        self.digest: str = about["digest"]
        self.num_bytes: int = about["num_bytes"]
        """Of all text, in UTF-8."""
        self._dtype = np.dtype(about["dtype"])

    @cached_property
    def tokens(self) -> NDArray[Any]:
        return np.memmap(self.folder / "tokens.bin", dtype=self._dtype, mode="r")

    @cached_property
    def counted(self) -> NDArray[np.bool_] | None:
        """Which tokens count in the loss; None: all."""
        path = self.folder / "counted.bin"
        return np.memmap(path, dtype=np.bool_, mode="r") if path.exists() else None

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        return np.memmap(self.folder / "ends.bin", dtype=np.int64, mode="r")

    @cached_property
    def ranks(self) -> NDArray[np.float64]:
        return np.memmap(self.folder / "ranks.bin", dtype=np.float64, mode="r")

    def __getstate__(self) -> dict[str, Any]:
        # A memory map would be pickled as all of its bytes.
        maps = {"tokens", "counted", "ends", "ranks"}
        return {name: value for name, value in vars(self).items() if name not in maps}


def prepare_tokens(
    described: list[Any],
    records: Iterable[Record],
    encoder: Encoder,
    *,
    vocab_size: int,
    cache_dir: Path,
    label: str,
) -> TokenStore:
    """The tokens of a source, from `cache_dir` if they are there.

    Args:
        described: Plain data that differs wherever the tokens would.
        records: Read only if they are not there, one batch after the other.
        label: What errors call the source.

    Raises:
        DataError: there are no records, or something is wrong with one.
    """
    key = xxhash.xxh3_64_hexdigest(json.dumps([_VERSION, described]).encode())
    dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)

    def build(folder: Path) -> None:
        logger.info("preparing the tokens of %s in %s", label, folder.parent)
        _write(folder, _encoded(records, encoder), dtype, label)

    return TokenStore(prepared_folder(cache_dir / f"tokens-{key}", build))


def _encoded(records: Iterable[Record], encoder: Encoder) -> Iterator[Encoded]:
    number = 0
    for batch in _batches(records):
        yield from encoder(batch, first=number)
        number += len(batch)


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    num_chars = 0
    for record in records:
        batch.append(record)
        num_chars += len(text_of(record))
        if len(batch) == _BATCH or num_chars >= _BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


def _write(folder: Path, documents: Iterable[Encoded], dtype: np.dtype[Any], label: str) -> None:
    digest, end, num_bytes, all_count = xxhash.xxh3_128(), 0, 0, True
    with ExitStack() as stack:
        files: dict[str, BinaryIO] = {
            name: stack.enter_context(open(folder / f"{name}.bin", "wb"))
            for name in ("tokens", "counted", "ends", "ranks")
        }
        for document in documents:
            still_working()
            tokens = np.array(document.tokens, dtype=dtype).tobytes()
            counted = document.counted
            all_count = all_count and counted is None
            flags = np.ones(len(document.tokens), dtype=np.bool_) if counted is None else counted
            end, num_bytes = end + len(document.tokens), num_bytes + document.num_bytes
            parts = {
                "tokens": tokens,
                "counted": flags.tobytes(),
                "ends": np.int64(end).tobytes(),
                "ranks": np.float64(content_rank(tokens)).tobytes(),
            }
            for name, content in parts.items():
                files[name].write(content)
                digest.update(content)
        for file in files.values():
            sync_file(file)
    if end == 0:
        raise DataError(f"the source {label} has no text", remedy="check task_args.sources")
    if all_count:
        (folder / "counted.bin").unlink()
    about = {"digest": digest.hexdigest(), "dtype": dtype.name, "num_bytes": num_bytes}
    with open(folder / _ABOUT, "wb") as out:
        out.write(json.dumps(about).encode())
        sync_file(out)
