"""Are the checkpoints of a directory as they were written? Looks, and changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harness.checkpoint.manifest import Damaged, Manifest
from harness.checkpoint.shards import check_file
from harness.checkpoint.store import Saved, Store
from harness.errors import CheckpointError

__all__ = ["CheckpointReport", "verify"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointReport:
    """What was found out about one checkpoint."""

    path: Path
    step: int
    healthy: bool
    size_bytes: int
    """Of its shards, as the manifest has it; 0 if the manifest is damaged."""
    world_size: int
    problems: tuple[str, ...]
    """What is wrong, file by file; empty if nothing is."""

    @property
    def intact(self) -> bool:
        """Whether it can be loaded."""
        return not self.problems


def verify(directory: str | Path) -> list[CheckpointReport]:
    """Reads every file of every committed checkpoint in `directory` once; oldest first.

    Raises:
        CheckpointError: `directory` cannot be read.
    """
    try:
        return [_verify_one(saved) for saved in Store(Path(directory)).saved()]
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {error.strerror}") from error


def _verify_one(saved: Saved) -> CheckpointReport:
    manifest: Manifest | None = None
    problems = []
    try:
        manifest = saved.manifest()
    except CheckpointError as error:
        problems.append(error.problem)
    for name, file in manifest.files.items() if manifest else ():
        try:
            check_file(saved.path / name, file)
        except Damaged as error:
            problems.append(error.problem)
    return CheckpointReport(
        path=saved.path,
        step=saved.step,
        healthy=saved.healthy,
        size_bytes=sum(file.size_bytes for file in manifest.files.values()) if manifest else 0,
        world_size=manifest.world_size if manifest else 0,
        problems=tuple(problems),
    )
