"""The directory of checkpoints: what is in it, what is committed, what leaves it. Only rank 0 acts here.

    step-00000100/          a committed checkpoint: shards and a manifest
    step-00000100.1/        the same step, committed again after a rollback
    .saving-00000200-x7/    an attempt; nothing is read from it, and the next run's first save removes it
    damaged-step-00000050/  set aside because a file was not as it was written
    abandoned-step-00000150/ of a branch that was left by a rollback

A checkpoint is committed by renaming its folder, which holds everything, flushed, the manifest last.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from harness.atomic import sync_folder
from harness.checkpoint.manifest import Damaged, Manifest
from harness.checkpoint.shards import write_file
from harness.errors import CheckpointError
from harness.files import read_file
from harness.runlog.paths import HEALTHY, MANIFEST, CheckpointName, checkpoint_of

__all__ = ["Saved", "Store"]

logger = logging.getLogger(__name__)

LONGEST_MANIFEST = 1 << 30
"""Bytes."""
_ATTEMPT = ".saving-"
_ABANDONED = "abandoned"
DAMAGED = "damaged"


@dataclass(frozen=True, slots=True, order=True)
class Saved:
    """A committed checkpoint. Newer ones are greater."""

    step: int
    copy: int
    """0, or which repetition of the same step this is."""
    path: Path

    @property
    def healthy(self) -> bool:
        """Whether enough steps without incident have followed it."""
        return (self.path / HEALTHY).exists()

    def manifest(self) -> Manifest:
        """Reads and checks the manifest.

        Raises:
            Damaged: it is missing, not as it was written, or of another step than the folder's name says.
        """
        try:
            content = read_file(self.path / MANIFEST, most_bytes=LONGEST_MANIFEST)
            manifest = Manifest.from_bytes(content)
        except OSError as error:
            raise Damaged(f"{MANIFEST} cannot be read: {error.strerror}") from error
        if manifest.step != self.step:
            raise Damaged(f"{MANIFEST} is of step {manifest.step}, in the folder of step {self.step}")
        return manifest


class Store:
    """The checkpoints in `directory`, which need not exist yet."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._cleared = False

    def saved(self) -> list[Saved]:
        """All committed checkpoints, oldest first, healthy or not, intact or not.

        Raises:
            OSError: the directory is there and cannot be read.
        """
        try:
            names = os.listdir(self.directory)
        except FileNotFoundError:
            return []
        found = []
        for name in names:
            if named := checkpoint_of(name):
                found.append(Saved(*named, self.directory / name))
        return sorted(found)

    def begin(self, step: int) -> Path:
        """A fresh folder for an attempt. The first one removes what dead attempts have left.

        Raises:
            OSError: the directory cannot be made or written.
        """
        # Only at first are parents made: a disk that is unmounted later must not be written beneath.
        self.directory.mkdir(parents=not self._cleared, exist_ok=True)
        if not self._cleared:
            self._clear_leftovers()
        return Path(tempfile.mkdtemp(prefix=f"{_ATTEMPT}{step:08d}-", dir=self.directory))

    def commit(self, folder: Path, manifest: Manifest) -> Saved:
        """Makes the attempt in `folder` the newest checkpoint.

        Raises:
            CheckpointError: a file that a rank has written is not to be seen from here.
            OSError: the disk is full, gone or read-only.
        """
        # A rank on another machine may have written to a disk of its own.
        for name, file in manifest.files.items():
            if not (folder / name).exists() or (folder / name).stat().st_size != file.size_bytes:
                raise CheckpointError(
                    f"{name} was written but is not in {folder}",
                    rule="all ranks have to write to the same, shared directory",
                )
        write_file(folder / MANIFEST, [manifest.to_bytes()])
        # Before the rename: after a power cut no folder may have a checkpoint's name and only some files.
        sync_folder(folder)
        saved = self._rename(folder, manifest.step)
        sync_folder(self.directory)
        return saved

    def discard(self, folder: Path) -> None:
        """Removes a failed attempt, as far as that can be done."""
        shutil.rmtree(folder, ignore_errors=True)

    def mark_healthy(self, saved: Saved) -> None:
        """Promotes a checkpoint: one empty file, flushed.

        Raises:
            OSError: the disk is full, gone or read-only.
        """
        # A file of its own, for a manifest is never written twice: a crash would leave half of one.
        (saved.path / HEALTHY).touch()
        sync_folder(saved.path)

    def abandon(self, *, after: int) -> None:
        """Sets aside what is newer than `after`: the branch has been left."""
        for saved in self.saved():
            if saved.step > after:
                kept = self.set_aside(saved, _ABANDONED)
                logger.info("%s is of a branch that was left; it is kept as %s", saved.path.name, kept)

    def abandoned(self) -> list[Saved]:
        """The checkpoints of branches that were left, oldest first."""
        found = []
        for path in self.directory.glob(f"{_ABANDONED}-*"):
            name = "-".join(path.name.split("-")[1:3])  # without the number that `set_aside` may have added
            if named := checkpoint_of(name):
                found.append(Saved(*named, path))
        return sorted(found)

    def set_aside_as_damaged(self) -> list[str]:
        """Names of the checkpoints that were set aside because a file was not as it was written."""
        return sorted(path.name for path in self.directory.glob(f"{DAMAGED}-*"))

    def set_aside(self, saved: Saved, kind: str) -> Path | None:
        """Renames a checkpoint, so that it is kept and never loaded. None if that cannot be done."""
        # The same step may be set aside several times, once for each rollback past it.
        for number in range(1000):
            name = f"{kind}-{saved.path.name}" + (f"-{number}" if number else "")
            try:
                if not (self.directory / name).exists():
                    return saved.path.rename(self.directory / name)
            except OSError as error:
                logger.warning("%s cannot be set aside: %s", saved.path, error)
                return None
        return None

    def delete(self, saved: Saved) -> None:
        """Removes a checkpoint; it stops being one at once, however long the removal takes.

        Raises:
            OSError: it cannot be renamed.
        """
        self.discard(saved.path.rename(self.directory / f"{_ATTEMPT}deleted-{saved.path.name}"))

    def _rename(self, folder: Path, step: int) -> Saved:
        # Never in the place of one that is there: a crash between the two renames would leave neither.
        copies = [saved.copy for saved in self.saved() if saved.step == step]
        copy = max(copies) + 1 if copies else 0
        path = self.directory / str(CheckpointName(step, copy))
        folder.chmod(0o755)  # mkdtemp's folders are their owner's alone
        return Saved(step, copy, folder.rename(path))

    def _clear_leftovers(self) -> None:
        for leftover in self.directory.glob(f"{_ATTEMPT}*"):
            logger.info("removing %s, left by a save that did not finish", leftover.name)
            self.discard(leftover)
        self._cleared = True
