"""A run's metrics as a file for other programs."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson

from harness.atomic import replacing
from harness.errors import TrackingError
from harness.runlog.codec import to_plain
from harness.runlog.paths import export_file
from harness.runlog.reader import Run, open_run
from harness.tracking.compare import settings_of

__all__ = ["FORMATS", "export_run"]

FORMATS = ("csv", "parquet", "json")


def export_run(
    run_dir: str | Path, path: str | Path | None = None, *, format: Literal["csv", "parquet", "json"] = "csv"
) -> Path:
    """Writes the timeline's metrics; `json` holds settings and events besides.

    csv and parquet have one row per point: `metric, step, value, time`; NaN and infinities are written as
    `nan`, `inf`, `-inf` (csv) or as they are (parquet). In json they are strings of that spelling.

    Args:
        run_dir: The run.
        path: Where to; default: `export.FORMAT` in the run directory.
        format: parquet needs pandas and pyarrow.

    Raises:
        TrackingError: there is no such run or format, or the file cannot be written.
    """
    if format not in FORMATS:
        raise TrackingError(f"the format is {format!r}", rule=f"it is one of {', '.join(FORMATS)}")
    run = open_run(run_dir)
    target = Path(path) if path is not None else export_file(run.path, format)
    write = {"csv": _write_csv, "parquet": _write_parquet, "json": _write_json}[format]
    try:
        with replacing(target) as unfinished:
            write(run, unfinished)
    except OSError as error:
        raise TrackingError(f"{target} cannot be written: {error.strerror}") from error
    return target


def _points(run: Run) -> Iterator[tuple[str, int, float, float]]:
    for name in run.names():
        series = run.scalars(name)
        for step, value, time in zip(*(array.tolist() for array in series), strict=True):
            yield name, step, value, time


def _write_csv(run: Run, path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["metric", "step", "value", "time"])
        writer.writerows((name, step, repr(value), repr(time)) for name, step, value, time in _points(run))


def _write_parquet(run: Run, path: Path) -> None:
    try:
        import pandas
        import pyarrow  # noqa: F401  (what pandas writes parquet with)
    except ImportError as error:
        raise TrackingError(
            f"parquet needs {error.name}", remedy="pip install 'stability-harness[analysis]'"
        ) from error
    series = {name: run.scalars(name) for name in run.names()}
    lengths = [len(s.steps) for s in series.values()]
    empty: list[Any] = [np.array([])]
    frame = pandas.DataFrame(
        {
            "metric": pandas.Categorical.from_codes(np.repeat(np.arange(len(series)), lengths), list(series)),
            "step": np.concatenate([s.steps for s in series.values()] or empty).astype(np.int64),
            "value": np.concatenate([s.values for s in series.values()] or empty),
            "time": np.concatenate([s.times for s in series.values()] or empty),
        }
    )
    frame.to_parquet(path, index=False)


def _write_json(run: Run, path: Path) -> None:
    metrics = {
        name: {"steps": s.steps.tolist(), "values": _spelled(s.values.tolist()), "times": s.times.tolist()}
        for name, s in ((name, run.scalars(name)) for name in run.names())
    }
    events = [dataclasses.asdict(event) for event in run.events()]
    document, _ = to_plain(
        {"run": run.path.resolve().name, "state": run.state(), "settings": settings_of(run)}
    )
    document |= {"metrics": metrics, "events": _spelled(events)}
    path.write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2))


def _spelled(value: Any) -> Any:
    """JSON has no NaN: spelled out instead."""
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: _spelled(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_spelled(each) for each in value]
    return value
