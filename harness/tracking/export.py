"""A run's metrics as a file for other programs."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import orjson

from harness.atomic import output_file, replacing
from harness.errors import TrackingError
from harness.runlog.codec import to_plain
from harness.runlog.paths import export_file
from harness.runlog.reader import Run, open_run
from harness.runlog.series import Series
from harness.tracking.compare import settings_of
from harness.tracking.text import spelled

__all__ = ["FORMATS", "export_run"]

FORMATS = ("csv", "parquet", "json")


def export_run(
    run_dir: str | Path, path: str | Path | None = None, *, format: Literal["csv", "parquet", "json"] = "csv"
) -> Path:
    """Writes the timeline's metrics; `json` holds settings and events besides.

    csv and parquet have one row per point: `metric, step, value, time`; those of a long run are ordered by
    stretches of some thousand steps, and in them by metric and step. NaN and infinities are written as `nan`,
    `inf`, `-inf` (csv) or as they are (parquet). In json they are strings of that spelling.

    Args:
        run_dir: The run.
        path: Where to; default: `export.FORMAT` in the run directory.
        format: parquet needs pyarrow.

    Raises:
        TrackingError: there is no such run or format, or the file cannot be written.
    """
    if format not in FORMATS:
        raise TrackingError(f"the format is {format!r}", rule=f"it is one of {', '.join(FORMATS)}")
    run = open_run(run_dir)
    target = Path(path) if path is not None else export_file(run.path, format)
    write = {"csv": _write_csv, "parquet": _write_parquet, "json": _write_json}[format]
    try:
        with replacing(target if path is None else output_file(target)) as unfinished:
            write(run, unfinished)
    except OSError as error:
        raise TrackingError(f"{target} cannot be written: {error.strerror}") from error
    return target


def _points(run: Run) -> Iterator[tuple[str, Series]]:
    """All metrics, a stretch of the run at a time; then the samples of nodes."""
    for stretch in run.stretches():
        yield from run.between(*stretch).items()
    for name in run.sample_names():
        yield name, run.scalars(name)


def _write_csv(run: Run, path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["metric", "step", "value", "time"])
        for name, series in _points(run):
            rows = zip(*(array.tolist() for array in series), strict=True)
            writer.writerows((name, step, repr(value), repr(time)) for step, value, time in rows)


def _write_parquet(run: Run, path: Path) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise TrackingError(
            f"parquet needs {error.name}", remedy="pip install 'stability-harness[analysis]'"
        ) from error
    numbers = {"step": pyarrow.int64(), "value": pyarrow.float64(), "time": pyarrow.float64()}
    schema = pyarrow.schema(
        {"metric": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()), **numbers}.items()
    )
    with parquet.ParquetWriter(path, schema) as writer:
        for name, series in _points(run):
            codes = pyarrow.array(np.zeros(len(series.steps), dtype=np.int32))
            metric = pyarrow.DictionaryArray.from_arrays(codes, [name])
            writer.write_table(pyarrow.table([metric, *series], schema=schema))


def _write_json(run: Run, path: Path) -> None:
    document, _ = to_plain(
        {"run": run.path.resolve().name, "state": run.state(), "settings": settings_of(run)}
    )
    events = [dataclasses.asdict(event) for event in run.events()]
    with path.open("wb") as file:
        file.write(orjson.dumps(document).removesuffix(b"}") + b',"events":' + orjson.dumps(spelled(events)))
        file.write(b',"metrics":{')
        for number, name in enumerate(run.names()):
            file.write((b",\n" if number else b"\n") + orjson.dumps(name) + b":" + _json(run.scalars(name)))
        file.write(b"\n}}\n")


def _json(series: Series) -> bytes:
    values = series.values if np.isfinite(series.values).all() else spelled(series.values.tolist())
    arrays = {"steps": series.steps, "values": values, "times": series.times}
    return orjson.dumps(arrays, option=orjson.OPT_SERIALIZE_NUMPY)
