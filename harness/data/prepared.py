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

from harness.atomic import sync_folder
from harness.errors import DataError
from harness.locks import locked

__all__ = ["build_folder", "prepared_folder", "put_aside", "sync_file"]

logger = logging.getLogger(__name__)


def prepared_folder(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, made by `build` unless it is there. Safe to call in any number of processes at once.

    Args:
        folder: Its name says what is in it: one of another content has another name.
        build: Writes the files into the empty folder that it is given.

    Raises:
        DataError: it cannot be written; or what `build` raises.
    """
    if not folder.exists():
        with _writing(folder.parent), locked(folder.with_suffix(".lock")):
            if not folder.exists():
                build_folder(folder, build)
    return folder


def build_folder(folder: Path, build: Callable[[Path], None]) -> None:
    """Makes `folder` by `build`, whole and on disk or not at all; of several processes one alone may do it.

    Raises:
        OSError: it cannot be written; or what `build` raises.
    """
    for stale in folder.parent.glob(f"{folder.name}.tmp-*"):
        shutil.rmtree(stale)
    unfinished = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    unfinished.mkdir()
    try:
        build(unfinished)
        _sync(unfinished)
        unfinished.rename(folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    logger.info("prepared %s", folder)


def put_aside(folder: Path) -> None:
    """Gives a damaged `folder` a name beside it, where it replaces what was put aside before.

    Raises:
        OSError: it cannot be renamed.
    """
    aside = folder.with_name(f"{folder.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)


def _sync(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            sync_folder(path)
        else:
            with open(path, "rb") as file:
                os.fsync(file.fileno())


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
