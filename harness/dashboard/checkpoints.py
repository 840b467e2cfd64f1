"""What a run's folder of checkpoints holds, seen from outside: names alone, nothing of them is read."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from harness.files import list_folder

__all__ = ["Checkpoint", "checkpoints"]

_COMMITTED = re.compile(r"step-([0-9]{8,18})(?:\.([0-9]{1,9}))?")  # as in harness/checkpoint/store.py
_MANIFEST = "manifest.json"
_HEALTHY = "healthy"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A committed checkpoint of a run."""

    step: int
    """Completed steps."""
    path: Path
    healthy: bool
    """Enough steps without incident have followed it."""


def checkpoints(run_dir: Path, *, within: Path | None = None) -> list[Checkpoint]:
    """The checkpoints of a run, oldest first, of each step the one that was committed last.

    Args:
        run_dir: The run's directory.
        within: See `harness.files.open_file`.
    """
    folder = run_dir / "checkpoints"
    names = list_folder(folder, within=within).folders
    found = sorted((int(m[1]), int(m[2] or 0), m[0]) for m in map(_COMMITTED.fullmatch, names) if m)
    newest = {step: folder / name for step, _, name in found}
    files = {step: list_folder(path, within=within).files for step, path in newest.items()}
    return [
        Checkpoint(step=step, path=path, healthy=_HEALTHY in files[step])
        for step, path in newest.items()
        if _MANIFEST in files[step]
    ]
