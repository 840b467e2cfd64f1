"""What a run's log says of its newest attempt, without reading the rest of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.files import open_file
from harness.runlog.codec import decode
from harness.runlog.paths import log_dir
from harness.runlog.reader import unreadable
from harness.runlog.segments import LONGEST_LINE_BYTES, segments

__all__ = ["newest_attempt", "schedule_steps"]


def newest_attempt(run_dir: Path, *, within: Path | None = None) -> Mapping[str, Any]:
    """What the newest attempt noted about itself when it began; empty if the log does not say.

    Args:
        run_dir: The run's directory.
        within: A folder above it, below which no link is followed; None: links are followed.

    Raises:
        TrackingError: the log cannot be read.
    """
    try:
        for path in reversed(segments(log_dir(run_dir), within=within)):
            with open_file(path, within=within) as file:  # an attempt begins one, and tells of itself first
                record = decode(file.readline(LONGEST_LINE_BYTES))
            if record is not None and record.kind == "run":
                return record.values
    except OSError as error:
        raise unreadable(run_dir, error) from error
    return {}


def schedule_steps(attempt: Mapping[str, Any]) -> int | None:
    """Length of the learning-rate schedule that an attempt followed; None if it does not say.

    In logs of releases in which the schedule had no length of its own it is the run's.
    """
    config = attempt.get("config")
    sections = config if isinstance(config, Mapping) else {}
    of_schedule, of_loop = (
        section["steps"]
        if isinstance(section := sections.get(name), Mapping) and "steps" in section
        else None
        for name in ("schedule", "loop")
    )
    for steps in (attempt.get("schedule_steps"), of_schedule, of_loop):
        if isinstance(steps, int) and steps > 0:
            return steps
    return None
