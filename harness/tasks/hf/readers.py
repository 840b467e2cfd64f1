"""The records of a source, one after the other, whatever it is kept in. Nothing is read as a whole.

A record is a mapping of columns. A text file is one record, or several where it is long.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.data.alive import working
from harness.data.corpus import SourceFile, list_files, looks_like_text, standard_library
from harness.errors import DataError, needs
from harness.tasks.hf.settings import SourceSettings

__all__ = ["identity", "records"]

logger = logging.getLogger(__name__)

Record = Mapping[str, Any]

_TABLES = (".jsonl", ".ndjson", ".parquet")
_LONGEST_TEXT = 2**20
"""Characters; a longer file is cut at the ends of lines."""
_COMPRESSED = (".bz2", ".gz", ".xz", ".zip", ".zst")
_SAVED_BY_DATASETS = "dataset_info.json"
_SAVED_SPLITS = "dataset_dict.json"
_NAMED = 5
"""Files that a warning names."""


def records(source: SourceSettings | None) -> Iterator[Record]:
    """All records, or the first `source.limit`; always the same ones in the same order.

    Args:
        source: None: the source of the Python standard library.

    Raises:
        DataError: something cannot be read, or is not what its name says.
    """
    if source is None:
        return _of_files(standard_library())
    found = _of_dataset(source) if source.dataset or _is_saved_dataset(source) else _of_path(source)
    return itertools.islice(found, source.limit) if source.limit else found


def identity(source: SourceSettings | None) -> list[Any]:
    """What tells the source from another, or from itself as it was: plain data, without reading it."""
    if source is None or (source.path and not _is_saved_dataset(source)):
        files = standard_library() if source is None else _files(source)
        return [source and source.limit, [(file.path, file.num_bytes, file.modified_ns) for file in files]]
    if source.path:
        folder = _saved_folder(source)
        return [str(folder), source.limit, Path(folder, _SAVED_BY_DATASETS).stat().st_mtime_ns]
    dataset = _loaded(source)
    return [source.dataset, source.subset, source.split, source.limit, dataset._fingerprint]


def _of_path(source: SourceSettings) -> Iterator[Record]:
    files = _files(source)
    left_out = sorted({file.path for file in list_files([source.path])} - {file.path for file in files})
    if left_out:
        logger.warning(
            "%d files of %s are left out, as they are binary or compressed: %s",
            len(left_out),
            source.path,
            ", ".join([*left_out[:_NAMED], *(["..."] if len(left_out) > _NAMED else [])]),
        )
    yield from _of_files(files)


def _files(source: SourceSettings) -> list[SourceFile]:
    readable = [file for file in list_files([source.path]) if _is_readable(file)]
    if not readable:
        raise DataError(
            f"there is nothing to read in {source.path}",
            rule="a source is text, .jsonl, .parquet, a folder of them, or one that datasets has saved; none"
            " of them compressed",
            remedy="check the path in task_args.sources",
        )
    return readable


def _is_readable(file: SourceFile) -> bool:
    suffix = Path(file.path).suffix
    return suffix in _TABLES or (suffix not in _COMPRESSED and looks_like_text(file))


def _of_files(files: Sequence[SourceFile]) -> Iterator[Record]:
    for file in files:
        path = Path(file.path)
        if path.suffix in (".jsonl", ".ndjson"):
            yield from _of_jsonl(path)
        elif path.suffix == ".parquet":
            yield from _of_parquet(path)
        else:
            yield from _of_text(path)


def _of_text(path: Path) -> Iterator[Record]:
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        while lines := file.readlines(_LONGEST_TEXT):
            yield {"text": "".join(lines)}


def _of_jsonl(path: Path) -> Iterator[Record]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number} is not JSON: {error}") from error
            if not isinstance(record, dict):
                raise DataError(
                    f"{path}, line {number} is a {type(record).__name__}", rule="a line is one object"
                )
            yield record


def _of_parquet(path: Path) -> Iterator[Record]:
    with needs("pyarrow", extra="hf"):
        import pyarrow
        import pyarrow.parquet
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error


def _is_saved_dataset(source: SourceSettings) -> bool:
    names = (_SAVED_BY_DATASETS, _SAVED_SPLITS)
    return bool(source.path) and any(Path(source.path, name).is_file() for name in names)


def _saved_folder(source: SourceSettings) -> Path:
    """Of the one dataset, or of the split where several were saved as a DatasetDict."""
    folder = Path(source.path)
    if not Path(folder, _SAVED_SPLITS).is_file():
        return folder
    if not Path(folder, source.split, _SAVED_BY_DATASETS).is_file():
        splits = sorted(path.parent.name for path in folder.glob(f"*/{_SAVED_BY_DATASETS}"))
        raise DataError(
            f"there is no split {source.split!r} in {folder}",
            rule=f"datasets has saved {', '.join(splits) or 'none'} there",
            remedy="set split in task_args.sources",
        )
    return folder / source.split


def _of_dataset(source: SourceSettings) -> Iterator[Record]:
    yield from _loaded(source)


def _loaded(source: SourceSettings) -> Any:
    """A `datasets.Dataset`, which is mapped into memory."""
    with needs("datasets", extra="hf"):
        import datasets
    folder = _saved_folder(source) if source.path else None
    try:
        with working():
            if folder:
                return datasets.load_from_disk(str(folder))
            return datasets.load_dataset(source.dataset, source.subset, split=source.split)
    except Exception as error:  # datasets has errors of a dozen libraries
        raise DataError(
            f"the dataset {source.path or source.dataset!r} cannot be loaded: {error!r}",
            rule="it is a name on the Hub or a folder, of which datasets.load_dataset finds the split",
            remedy="check dataset, subset and split in task_args.sources",
        ) from error
