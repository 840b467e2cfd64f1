"""Reads checkpoints of somebody's run into objects of one's own, and changes nothing on the disk."""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from harness.checkpoint.manifest import Damaged, Manifest
from harness.checkpoint.reading import OnDisk
from harness.checkpoint.restore import Restore
from harness.checkpoint.shards import check_file
from harness.checkpoint.store import Saved, Store
from harness.errors import CheckpointError

__all__ = ["committed", "read_into", "verified"]


def committed(directory: Path) -> list[Saved]:
    """All committed checkpoints, oldest first, intact or not.

    Raises:
        CheckpointError: the directory cannot be read.
    """
    try:
        return Store(directory).saved()
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {error.strerror}") from error


def verified(saved: Saved) -> Manifest:
    """The checkpoint's manifest, once all files have been compared with their checksums.

    Raises:
        Damaged: one is not as it was written; or the run has deleted it meanwhile.
    """
    manifest = saved.manifest()
    for name, file in manifest.files.items():
        check_file(saved.path / name, file)
    return manifest


def read_into(saved: Saved, manifest: Manifest, state: MutableMapping[str, Any], *, rank: int = 0) -> None:
    """Brings what was saved into `state`, as rank `rank` would take it over. Local, without a process group.

    Raises:
        CheckpointError: it is of another model, or cannot be read any more.
    """
    try:
        restore = Restore(OnDisk(saved.path, manifest), state, rank)
        restore.read()
    except OSError as error:
        raise Damaged(f"{saved.path.name} cannot be read: {error.strerror}") from error
    restore.apply()
