"""Locks among processes, held by means of a file and gone with the process, however it ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

__all__ = ["LockHeldError", "ProcessLock", "locked"]

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits until no other process or thread holds the lock, then holds it.

    On a file system without locks it is not held: then there is nothing to be done.

    Args:
        path: The lock's file, which is made if need be and stays.

    Raises:
        OSError: it cannot be opened.
    """
    with open(path, "ab") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


class LockHeldError(Exception):
    """Somebody else holds the lock; says who, as far as that is known."""


class ProcessLock:
    """Held by one process at a time; does not wait.

    A POSIX record lock: unlike `flock` it is not inherited by forked loader workers, so none of them can
    keep it after the trainer's death, and it works across the machines of a network file system. It knows
    processes only, hence the set of what this process holds.

    Raises:
        LockHeldError: it is held, by this process or another.
        OSError: its file cannot be opened.
    """

    _held: set[tuple[int, int]] = set()  # noqa: RUF012  (shared by all instances on purpose)

    def __init__(self, path: Path) -> None:
        # Closing any descriptor of the file would drop a lock that this process holds: look first.
        if path.exists() and _key(path.stat()) in self._held:
            raise LockHeldError(f"process {os.getpid()} itself")
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                holder = os.read(self._fd, 200).decode(errors="replace") or "another process"
                os.close(self._fd)
                raise LockHeldError(holder) from None
            logger.warning("%s cannot be locked (%s): make sure that one process writes there", path, error)
        os.ftruncate(self._fd, 0)
        os.write(self._fd, f"process {os.getpid()} on {socket.gethostname()}".encode())
        self._held_as = _key(os.fstat(self._fd))  # of the file, which may lose its path
        self._held.add(self._held_as)

    def release(self) -> None:
        """Lets go of it."""
        self._held.discard(self._held_as)
        with contextlib.suppress(OSError):
            os.close(self._fd)


def _key(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
