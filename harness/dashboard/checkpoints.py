"""What a run's folder of checkpoints holds, seen from outside: names alone, nothing of them is read."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from harness.files import list_folder
from harness.runlog.paths import HEALTHY, MANIFEST, checkpoint_of, checkpoints_dir

__all__ = ["Checkpoint", "checkpoints"]


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
    folder = checkpoints_dir(run_dir)
    names = list_folder(folder, within=within).folders
    found = sorted(named for named in map(checkpoint_of, names) if named)
    newest = {named.step: folder / str(named) for named in found}
    files = {step: list_folder(path, within=within).files for step, path in newest.items()}
    return [
        Checkpoint(step=step, path=path, healthy=HEALTHY in files[step])
        for step, path in newest.items()
        if MANIFEST in files[step]
    ]
