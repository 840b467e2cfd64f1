"""What replays have found of a run's incidents."""

from __future__ import annotations

from pathlib import Path

from harness.files import read_file
from harness.runlog.digest import Digest
from harness.runlog.names import EventName
from harness.runlog.paths import story_file

__all__ = ["read_stories", "read_story"]

STORY_BYTES = 64 << 10
MAX_STORIES = 100


def read_story(run_dir: Path, step: int, *, within: Path | None = None) -> str | None:
    """The story of a step, or None where none is kept or it is too long.

    Args:
        run_dir: Of the run.
        step: Its number.
        within: See `harness.files.open_file`.
    """
    try:
        text = read_file(story_file(run_dir, step), most_bytes=STORY_BYTES, within=within)
    except (OSError, ValueError):
        return None
    return text.decode(errors="replace")


def read_stories(digest: Digest) -> dict[str, str]:
    """Those of the newest incidents, by step."""
    steps = [event.step for event in digest.events() if event.name == EventName.INCIDENT]
    newest = list(dict.fromkeys(step for step in reversed(steps) if step is not None and step >= 0))
    stories = {
        str(step): read_story(digest.path, step, within=digest.within) for step in newest[:MAX_STORIES]
    }
    return {step: story for step, story in stories.items() if story is not None}
