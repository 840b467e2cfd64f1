"""Runs side by side: what was set differently, what came out, and where each parts from the first."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.dashboard.run_index import RunIndex
from harness.errors import TrackingError
from harness.runlog.log_follower import log_signature
from harness.runlog.names import Prefix
from harness.tracking.compare import compare_runs, different_settings, settings_of
from harness.tracking.text import spelled

__all__ = ["compare_view"]

MAX_TEXT = 500
MAX_LOG_BYTES = 64 << 20
"""Comparing bit for bit reads both logs whole; longer ones are for the command line."""


def compare_view(run_index: RunIndex, runs: Sequence[str]) -> dict[str, Any]:
    """Settings that differ, last values, and for every run but the first the step at which they part.

    Of a run that is gone, or cannot be read, there is nothing but the reason, in place of where it parts.
    """
    there = set(run_index.names())
    columns = [_column(run_index, run) if run in there else ("gone", {}, {}) for run in runs]
    states, settings, last = zip(*columns, strict=True)
    return {
        "states": states,
        "settings": [
            {"name": name, "values": [_shown(value) for value in values]}
            for name, values in different_settings(settings).items()
        ],
        "metrics": _rows(last),
        "partings": [_parting(run_index, runs[0], run) for run in runs[1:]],
    }


def _column(run_index: RunIndex, run: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """A run's state, settings and last values."""
    try:
        with run_index.reading(run) as digest:
            names = [
                name
                for name in digest.names()
                if not name.startswith((Prefix.LAYERS, Prefix.RANKS, Prefix.SYSTEM))
            ]
            last = {name: spelled(digest.last(name)) for name in names}
            return digest.state(), settings_of(digest), last
    except TrackingError:
        return "unreadable", {}, {}


def _rows(columns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    names = sorted({name for column in columns for name in column})
    return [{"name": name, "values": [_shown(column.get(name)) for column in columns]} for name in names]


def _shown(value: Any) -> Any:
    return value if value is None or isinstance(value, float) else str(value)[:MAX_TEXT]


def _parting(run_index: RunIndex, first: str, second: str) -> dict[str, Any]:
    try:
        return _parting_of(run_index, [first, second])
    except TrackingError as error:
        return {"runs": [first, second], "error": error.problem}
    except OSError as error:  # the log is being deleted
        return {"runs": [first, second], "error": error.strerror or str(error)}


def _parting_of(run_index: RunIndex, runs: list[str]) -> dict[str, Any]:
    paths = [run_index.directory(run) for run in runs]
    if sum(_log_bytes(run_index, run) for run in runs) > MAX_LOG_BYTES:
        return {"runs": runs, "error": "too long to compare here; `harness compare` takes its time"}
    signatures = tuple(log_signature(path, within=run_index.root) for path in paths)
    return {"runs": runs, **_compared(paths[0], paths[1], run_index.root, signatures)}


@functools.lru_cache(maxsize=256)
def _compared(first: Path, second: Path, within: Path, signatures: Any) -> dict[str, Any]:
    """Where two runs part; logs that are as they were (`signatures`) are not read again."""
    comparison = compare_runs(first, second, within=within)
    if not comparison.partings:
        return {"num_common": 0}
    earliest = comparison.partings[0]
    return {
        "metric": earliest.metric,
        "step": earliest.step,
        "num_common": comparison.num_common,
        "values": [repr(value) for value in earliest.values or ()],
    }


def _log_bytes(run_index: RunIndex, run: str) -> int:
    with run_index.reading(run) as digest:
        return digest.log_bytes()
