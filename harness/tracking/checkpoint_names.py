"""Names of a tracker's checkpoints, and what people may ask for instead of one."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from harness.errors import TrackingError
from harness.runlog.paths import checkpoint_of

__all__ = ["Wanted", "checkpoint_name", "wanted_checkpoint"]

_NAME = re.compile(r"checkpoint_epoch_(-?\d+)_step_(\d+)(?:\.pt)?")


@dataclasses.dataclass(frozen=True, slots=True)
class Wanted:
    """Which checkpoint is meant; the newest one where nothing is said."""

    folder: Path | None = None
    """The checkpoints' folder, if it is not that of the run."""
    epoch: int | None = None
    step: int | None = None
    saved_as: str | None = None
    """The very folder on the disk."""


def checkpoint_name(epoch: int, step: int) -> str:
    """The name that `save_checkpoint` returns."""
    return f"checkpoint_epoch_{epoch}_step_{step}.pt"


def wanted_checkpoint(name: str | Path | None) -> Wanted:
    """Reads a name as `save_checkpoint` returns it, with or without a path, or a path on the disk: of one
    checkpoint, or of a folder that holds a run's.

    Raises:
        TrackingError: it is none of these.
    """
    if name is None:
        return Wanted()
    path = Path(name)
    folder = path.parent if path.parent != Path() else None
    if match := _NAME.fullmatch(path.name):
        return Wanted(folder, epoch=int(match[1]), step=int(match[2]))
    if checkpoint_of(path.name):
        return Wanted(folder, saved_as=path.name)
    if str(name) and path.is_dir():
        return Wanted(path)
    raise TrackingError(
        f"{str(name)!r} is no checkpoint's name", rule="such names are like checkpoint_epoch_10_step_1000.pt"
    )
