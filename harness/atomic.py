"""Files that are written whole or not at all: readers and crashes see the old content or the new."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

__all__ = ["output_file", "replacing", "sync_folder", "write_atomically"]


@contextlib.contextmanager
def replacing(path: Path, *, overwrite: bool = True, sync: bool = False) -> Iterator[Path]:
    """Gives the name of a file to write, in the same folder; when the block ends it becomes `path`.

    If the block raises, that file is removed and `path` stays as it was. Any number of processes and threads
    may do this at once: the last one holds.

    Args:
        path: The file; its folder exists.
        overwrite: Whether it may replace one that is there.
        sync: Forces file and name onto the disk; some milliseconds.

    Raises:
        FileExistsError: `path` is there, and `overwrite` is false.
        OSError: the disk is full, gone or read-only.
    """
    unfinished = path.with_name(f".{uuid.uuid4().hex[:8]}-tmp.{path.name}")  # the suffix tells what it is
    try:
        yield unfinished
        if sync:
            with open(unfinished, "rb") as file:
                os.fsync(file.fileno())
        if overwrite:
            unfinished.replace(path)
        else:
            os.link(unfinished, path)  # which fails where something is
        if sync:
            sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes, *, overwrite: bool = True, sync: bool = False) -> None:
    """Writes a small file, text as UTF-8; see `replacing`."""
    with replacing(path, overwrite=overwrite, sync=sync) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


def output_file(path: str | Path) -> Path:
    """The file that is meant by a path from the command line, links followed, to be given to `replacing`.

    Raises:
        OSError: something other than a regular file is there, which would be replaced by one.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if os.path.lexists(target) and not target.is_file():  # a pipe, a device, a circle of links
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return target


def sync_folder(path: Path) -> None:
    """Forces the names in a folder onto the disk, so that they survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
