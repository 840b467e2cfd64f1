"""Data that is prepared once per machine and kept in a folder between runs.

The first process takes a file lock, writes into a folder of another name and renames it when all is on
disk; the others wait for the lock and find it done. What a killed process leaves behind is never read, and
swept away by the next one.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from harness.errors import DataError
from harness.locks import locked

__all__ = ["build_folder", "prepared_folder", "sync_file"]

logger = logging.getLogger(__name__)


def prepared_folder(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, made by `build` unless it is there. Safe to call in any number of processes at once.

    Args:
        folder: Its name says what is in it: one of another content has another name.
        build: Writes the files into the empty folder that it is given, and syncs them.

    Raises:
        DataError: it cannot be written; or what `build` raises.
    """
    if not folder.exists():
        with _writing(folder.parent), locked(folder.with_suffix(".lock")):
            if not folder.exists():
                build_folder(folder, build)
    return folder


def build_folder(folder: Path, build: Callable[[Path], None]) -> None:
    """Makes `folder` by `build`, whole or not at all; of several processes one alone may do it.

    Raises:
        OSError: it cannot be written; or what `build` raises.
    """
    for stale in folder.parent.glob(f"{folder.name}.tmp-*"):
        shutil.rmtree(stale)
    unfinished = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    unfinished.mkdir()
    try:
        build(unfinished)
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    logger.info("prepared %s", folder)


def sync_file(file: BinaryIO) -> None:
    """Forces what was written onto the disk."""
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise DataError(
            f"cannot write prepared data to {folder}: {error.strerror}",
            rule="it is kept there between runs",
            remedy="name another folder with --data.cache_dir or HARNESS_CACHE",
        ) from error
