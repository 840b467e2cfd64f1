"""Turns files of text into one array of bytes on disk for training and one for validation.

A corpus is prepared once per machine; see `harness.data.prepared`.

Each file, cut into pieces if it is long, goes to the training or to the validation part by a hash of its
bytes, so that it is on the same side wherever it lies and in whatever order it is read, and copies of it
are never on both. A 0 byte, which text does not contain, follows each piece.

What is read of a file is what was there when it was listed: one that has grown since gives the same corpus,
one that was changed is an error. Each part's checksum is taken while it is written and kept beside it.
"""

from __future__ import annotations

import json
import logging
import os
import stat
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import xxhash

from harness.data.alive import still_working
from harness.data.origin import Origin
from harness.data.prepared import prepared_folder, sync_file
from harness.data.split import content_rank, val_limit
from harness.errors import DataError

__all__ = [
    "SEPARATOR",
    "Corpus",
    "Part",
    "SourceFile",
    "list_files",
    "looks_like_text",
    "prepare",
    "standard_library",
]

logger = logging.getLogger(__name__)

SEPARATOR = b"\0"

_VERSION = 3
"""Raised whenever the same files would give other bytes or another split."""
_LONGEST_PIECE_BYTES = 2**20
_SHORTEST_PIECE_BYTES = 2**12
_SNIFFED_BYTES = 8192
_PARTS = ("train", "val")
_DIGESTS = "digests.json"


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file as it was when it was listed."""

    path: str
    num_bytes: int
    modified_ns: int
    named: bool
    """Given by name rather than found in a folder: taken whatever it looks like."""


@dataclass(frozen=True, slots=True)
class Part:
    """A prepared file of raw bytes, for training or for validation."""

    path: Path
    digest: str
    """xxh3_128 of its bytes, which tells its text from any other."""
    origin: Origin


@dataclass(frozen=True, slots=True)
class Corpus:
    """Both parts."""

    train: Part
    val: Part


@dataclass(frozen=True, slots=True)
class _Piece:
    """`num_bytes` at `start` of `path`; `rank` in [0, 1] is the hash of them."""

    path: str
    start: int
    num_bytes: int
    rank: float


def standard_library() -> list[SourceFile]:
    """The source of the Python standard library, about 31 MB that every machine has."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "__pycache__"}
    paths = sorted(path for path in root.rglob("*.py") if not left_out.intersection(path.parts))
    return [_source_file(path, named=True) for path in paths]


def list_files(paths: Iterable[str]) -> list[SourceFile]:
    """Files named in `paths` and all regular files under folders named there, hidden ones left out.

    Raises:
        DataError: a path does not exist or cannot be read.
    """
    files: list[SourceFile] = []
    for path in (Path(text).expanduser().absolute() for text in paths):
        if path.is_dir():
            files += [_source_file(found, named=False) for found in _walk(path)]
        else:
            files.append(_source_file(path, named=True))
    return [file for file in files if file.num_bytes > 0]


def prepare(files: Sequence[SourceFile], *, val_frac: float, cache_dir: Path) -> Corpus:
    """The corpus made of `files`, from `cache_dir` if it is there already.

    Safe to call in any number of processes at once.

    Raises:
        DataError: no text, a file that cannot be read or has changed since it was listed, too little to be
            split, or `cache_dir` cannot be written.
    """
    folder = cache_dir / f"text-{_key(files, val_frac)}"
    prepared_folder(folder, lambda unfinished: _build(files, val_frac, unfinished))
    train, val = _parts(folder)
    return Corpus(train=train, val=val)


def _parts(folder: Path) -> list[Part]:
    try:
        digests = json.loads((folder / _DIGESTS).read_bytes())
        return [Part(folder / f"{name}.bin", str(digests[name]), Origin(folder / name)) for name in _PARTS]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"the prepared text in {folder} is damaged: {_DIGESTS} cannot be read",
            rule="it is written once, whole, and never changed",
            remedy="remove that folder, and the text is prepared anew",
        ) from error


def _source_file(path: Path, *, named: bool) -> SourceFile:
    with _reading(path):
        found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"{path} is neither a file nor a folder", remedy="name text files or folders of them")
    return SourceFile(str(path), found.st_size, found.st_mtime_ns, named)


def _walk(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise _unreadable(error.filename, error) from error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(parent, name) for name in sorted(names) if not name.startswith(".")):
            if path.is_file() or path.is_symlink():  # sockets and pipes are no text
                yield path


def _key(files: Sequence[SourceFile], val_frac: float) -> str:
    identity = [_VERSION, val_frac, [(f.path, f.num_bytes, f.modified_ns, f.named) for f in files]]
    return xxhash.xxh3_64_hexdigest(json.dumps(identity).encode())


def _build(files: Sequence[SourceFile], val_frac: float, folder: Path) -> None:
    logger.info("preparing %d files of text in %s", len(files), folder.parent)
    parts = _split(list(_pieces(files, val_frac)), val_frac)
    digests = {name: _write_part(folder / name, pieces) for name, pieces in zip(_PARTS, parts, strict=True)}
    with open(folder / _DIGESTS, "wb") as out:
        out.write(json.dumps(digests).encode())
        sync_file(out)


def _write_part(path: Path, pieces: Sequence[_Piece]) -> str:
    """Writes `pieces`, and where they come from; the digest of all that was written."""
    digest = xxhash.xxh3_128()
    Origin(path).write([(piece.path, piece.start, piece.num_bytes + len(SEPARATOR)) for piece in pieces])
    with open(path.with_suffix(".bin"), "wb") as out:
        for piece in pieces:
            content = _read(piece.path, piece.start, piece.num_bytes)
            if content_rank(content) != piece.rank:
                raise _changed(piece.path)
            for written in (content, SEPARATOR):
                digest.update(written)
                out.write(written)
        sync_file(out)
    return digest.hexdigest()


def _split(pieces: Sequence[_Piece], val_frac: float) -> tuple[list[_Piece], list[_Piece]]:
    """Pieces to learn from, and pieces held out."""
    limit = val_limit([piece.rank for piece in pieces], val_frac)
    if limit is None:
        raise DataError(
            f"the text is a single piece of {sum(piece.num_bytes for piece in pieces)} bytes",
            rule="held-out text is taken from other files, or from other pieces of a file of more than"
            f" {_SHORTEST_PIECE_BYTES} bytes",
            remedy="add more text to --data.paths",
        )
    return [p for p in pieces if p.rank >= limit], [p for p in pieces if p.rank < limit]


def _pieces(files: Sequence[SourceFile], val_frac: float) -> Iterator[_Piece]:
    texts = [file for file in files if file.named or looks_like_text(file)]
    if not texts:
        raise DataError(
            f"there is no text in the {len(files)} non-empty files given",
            rule="files in folders count as text if not hidden and without 0 bytes at the beginning",
            remedy="check --data.paths",
        )
    longest = _piece_bytes([file.num_bytes for file in texts], val_frac)
    for file in texts:
        for start in range(0, file.num_bytes, longest):
            content = _read(file.path, start, min(longest, file.num_bytes - start))
            yield _Piece(file.path, start, len(content), content_rank(content))


def _piece_bytes(sizes: Sequence[int], val_frac: float) -> int:
    """Short enough that a corpus of few files has a piece to hold out, as far as that goes."""
    longest = _LONGEST_PIECE_BYTES
    while longest > _SHORTEST_PIECE_BYTES and sum(-(-size // longest) for size in sizes) < 1 / val_frac:
        longest //= 2
    return longest


def looks_like_text(file: SourceFile) -> bool:
    """Whether there is no 0 byte at its beginning."""
    return SEPARATOR not in _read(file.path, 0, min(_SNIFFED_BYTES, file.num_bytes))


def _read(path: str, start: int, num_bytes: int) -> bytes:
    """Exactly `num_bytes`, which were there when the file was listed."""
    with _reading(path), open(path, "rb") as file:
        file.seek(start)
        content = file.read(num_bytes)
    still_working()
    if len(content) < num_bytes:
        raise _changed(path)
    return content


@contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str | Path, error: OSError) -> DataError:
    return DataError(
        f"cannot read {path}: {error.strerror}",
        rule="each path has to be a readable file or folder",
        remedy="check --data.paths, or take the file away",
    )


def _changed(path: str) -> DataError:
    return DataError(
        f"{path} was changed while it was read",
        rule="a corpus is made of files that stand still; they may grow at the end",
        remedy="start again when it is written, or give a copy of it to --data.paths",
    )
