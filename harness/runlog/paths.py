"""Where in a run's directory what lies, and the names of checkpoints.

log/                    the run's log, what the mirrors have taken of it, images and graphs
checkpoints/            what `checkpoint_of` reads the names of
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from harness.files import read_file

__all__ = [
    "HEALTHY",
    "MANIFEST",
    "MEDIA_BYTES",
    "CheckpointName",
    "checkpoint_of",
    "checkpoints_dir",
    "log_dir",
    "media_bytes",
]

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
"""In a checkpoint's folder: the file without which it is none."""
HEALTHY = "healthy"
"""In a checkpoint's folder: the empty file that says that it has proved itself."""
MEDIA_BYTES = 64 << 20
"""Longest image or graph beside the log; mirrors hold it in memory."""
_CHECKPOINT = re.compile(r"step-([0-9]{8,18})(?:\.([0-9]{1,9}))?")


class CheckpointName(NamedTuple):
    """What the name of a committed checkpoint's folder says. Newer ones are greater."""

    step: int
    """Completed steps."""
    copy: int = 0
    """0, or which repetition of the same step this is: after a rollback it is committed again."""

    def __str__(self) -> str:
        return f"step-{self.step:08d}" + (f".{self.copy}" if self.copy else "")


def checkpoint_of(name: str) -> CheckpointName | None:
    """Reads the name of a folder; None if no committed checkpoint is called so."""
    match = _CHECKPOINT.fullmatch(name)
    named = CheckpointName(int(match[1]), int(match[2] or 0)) if match else None
    return named if str(named) == name else None


def log_dir(run_dir: str | Path) -> Path:
    """Where a run directory keeps its log."""
    return Path(run_dir) / "log"


def checkpoints_dir(run_dir: str | Path) -> Path:
    """Where a run directory keeps its checkpoints."""
    return Path(run_dir) / "checkpoints"


def media_bytes(run_dir: Path, record: Mapping[str, Any]) -> bytes | None:
    """What the file beside the log holds that an image or a graph lies in; None if there is none in the run's
    directory, or if it is longer than `MEDIA_BYTES`.

    The record may be anybody's: no file from elsewhere becomes a part of a mirror.
    """
    try:
        return read_file(run_dir / record["file"], most_bytes=MEDIA_BYTES, within=run_dir)
    except (OSError, ValueError) as error:
        logger.warning("%s names a file that is not there, not in it, or too long: %s", run_dir, error)
        return None
