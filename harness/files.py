"""Reading files that somebody else may have put there.

A folder of runs can hold what no run ever wrote: a link to another file, a pipe that would be waited for, a
device, a file without end. What is opened here is a regular file and nothing else. With `within`, neither it
nor a folder on the way to it is a link: whoever asks over a network sees no byte from outside that folder.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

__all__ = ["Listing", "file_status", "list_folder", "nearest_folder", "open_file", "read_file"]

_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC  # not to wait for a pipe's other end
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.EPERM)


class Listing(NamedTuple):
    """The names in a folder, sorted; what is neither a regular file nor a folder is left out."""

    files: list[str]
    folders: list[str]


def nearest_folder(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    folder = folder.absolute()
    return next(each for each in (folder, *folder.parents) if each.is_dir())


def open_file(path: Path, *, within: Path | None = None) -> BufferedReader:
    """Opens a regular file for reading.

    Args:
        path: The file.
        within: A folder above it, below which no link is followed; None: links are followed.

    Raises:
        OSError: it is not there, is no regular file, or is reached through a link or by `..`.
    """
    with _place(path, within) as (folder, name):
        _check_regular(os.stat(name, dir_fd=folder, follow_symlinks=within is None), path)
        fd = os.open(name, _READ | (0 if within is None else os.O_NOFOLLOW), dir_fd=folder)
    try:
        _check_regular(os.fstat(fd), path)  # it may have been replaced meanwhile
        return os.fdopen(fd, "rb")
    except OSError:
        os.close(fd)
        raise


def read_file(path: Path, *, most_bytes: int, within: Path | None = None) -> bytes:
    """The whole content of a regular file.

    Raises:
        OSError: as for `open_file`; or it is longer than `most_bytes`.
    """
    with open_file(path, within=within) as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise OSError(errno.EFBIG, f"longer than {most_bytes} bytes", str(path))
    return content


def file_status(path: Path, *, within: Path | None = None) -> os.stat_result:
    """Size and times of a regular file, which is not opened.

    Raises:
        OSError: as for `open_file`.
    """
    with _place(path, within) as (folder, name):
        status = os.stat(name, dir_fd=folder, follow_symlinks=within is None)
    _check_regular(status, path)
    return status


def list_folder(folder: Path, *, within: Path | None = None) -> Listing:
    """What lies in a folder; nothing if there is none, if it may not be read, or if it is a link `within`.

    Raises:
        OSError: the disk fails.
    """
    try:
        with _opened(folder, within) as opened, os.scandir(opened) as entries:
            found = [(one.name, _kind(one, follow=within is None)) for one in entries]
    except OSError as error:
        if error.errno in _ABSENT:
            return Listing([], [])
        raise
    return Listing(*(sorted(name for name, kind in found if kind == wanted) for wanted in ("file", "folder")))


@contextlib.contextmanager
def _place(path: Path, within: Path | None) -> Iterator[tuple[int | None, str]]:
    """The open folder that holds `path`, and its name there; without `within` None and the path."""
    if within is None:
        yield None, os.fspath(path)
        return
    with _opened(path.parent, within) as folder:
        assert isinstance(folder, int)
        yield folder, path.name


@contextlib.contextmanager
def _opened(folder: Path, within: Path | None) -> Iterator[int | Path]:
    """The folder, opened step by step so that no link is followed below `within`; else as it is."""
    if within is None:
        yield folder
        return
    steps = folder.relative_to(within).parts if folder.is_relative_to(within) else ("..",)
    if ".." in steps:
        raise OSError(errno.EPERM, f"not below {within}", str(folder))
    fd = os.open(within, _FOLDER)
    try:
        for step in steps:
            inner = os.open(step, _FOLDER | os.O_NOFOLLOW, dir_fd=fd)
            os.close(fd)
            fd = inner
        yield fd
    finally:
        os.close(fd)


def _check_regular(status: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def _kind(entry: os.DirEntry[str], *, follow: bool) -> str:
    try:
        if entry.is_file(follow_symlinks=follow):
            return "file"
        return "folder" if entry.is_dir(follow_symlinks=follow) else "other"
    except OSError:  # gone meanwhile, or a link that leads nowhere
        return "other"
