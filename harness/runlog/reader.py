"""Reads a run's log: one consistent timeline, or the branches that restarts and rollbacks abandoned.

    run = open_run("runs/quickstart")
    steps, values, times = run.scalars("train/loss")
    while run.state() == "running":
        run.refresh()

A rewind abandons what was logged for its step and everything after it; nothing else does. Of a step that was
logged more than once the later value of each metric holds. Nothing here writes, and a log that is being
written can be read at any time.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.errors import TrackingError
from harness.runlog.codec import Record
from harness.runlog.paths import log_dir
from harness.runlog.segments import Follower, node_folders, segments
from harness.runlog.series import Layers, Series, joined, last_of_each_step
from harness.runlog.timeline import SCALAR_KINDS, Event, State, Timeline, newest_steps

if TYPE_CHECKING:
    import pandas

__all__ = ["Event", "Layers", "Run", "Series", "State", "is_run", "no_run", "open_run", "unreadable"]

_KEPT_KINDS = frozenset({"text", "image", "histogram", "graph", "layers", "ranks"})


class _Column:
    __slots__ = ("rows", "values")

    def __init__(self) -> None:
        self.rows = array("q")
        self.values = array("d")


class _Attempt:
    """What one attempt logged; rows are records, columns refer to rows."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.steps = array("q")
        self.newest_step = 0
        self.times = array("d")
        self.columns: dict[str, _Column] = {}

    def add(self, step: int, time: float, values: dict[str, Any]) -> None:
        row = len(self.steps)
        self.steps.append(step)
        self.newest_step = max(step, self.newest_step)
        self.times.append(time)
        for name, value in values.items():
            if isinstance(value, (float, int)):
                column = self.columns.get(name)
                if column is None:
                    column = self.columns[name] = _Column()
                column.rows.append(row)
                column.values.append(value)

    def series(self, name: str, before: float) -> Series | None:
        """The metric's points at steps less than `before`, in the order of writing."""
        column = self.columns.get(name)
        if column is None:
            return None
        rows = np.array(column.rows, dtype=np.int64)
        points = Series(
            np.array(self.steps, dtype=np.int64)[rows], np.array(column.values), np.array(self.times)[rows]
        )
        return points.at(points.steps < before)


def open_run(run_dir: str | Path, *, within: Path | None = None) -> Run:
    """Reads the log of a run directory.

    Args:
        run_dir: The run's directory.
        within: A folder above it, below which no link is followed; None: links are followed.

    Raises:
        TrackingError: there is no log in it, or it cannot be read.
    """
    try:
        if is_run(run_dir, within=within):
            return Run(run_dir, within=within)
    except OSError as error:
        raise unreadable(run_dir, error) from error
    raise no_run(run_dir)


def no_run(run_dir: str | Path) -> TrackingError:
    """What to say of a directory that holds no log."""
    return TrackingError(
        f"{run_dir} is not a run",
        rule="a run directory holds a folder `log`",
        remedy="`harness runs` lists the runs that there are",
    )


def is_run(run_dir: str | Path, *, within: Path | None = None) -> bool:
    """Whether the directory holds a log."""
    return bool(segments(log_dir(run_dir), within=within))


def unreadable(run_dir: str | Path, error: OSError) -> TrackingError:
    """What to say when the disk fails, or a run is removed while it is read."""
    return TrackingError(f"the log of {run_dir} cannot be read: {error.strerror or error}")


class Run(Timeline):
    """A run as its log tells it; `refresh` reads on from where it stopped.

    Attributes:
        records: Records that are not scalars (`text`, `image`, `histogram`, `graph`, `layers`, `ranks`), by
            kind, in the order of writing.
        num_damaged: Complete lines that are no records; a healthy log has none.
    """

    def __init__(self, run_dir: str | Path, *, within: Path | None = None) -> None:
        super().__init__(run_dir, within=within)
        self.records: dict[str, list[Record]] = {}
        self._attempts: dict[int, _Attempt] = {}
        self._system = _Attempt(0)
        self._followers: dict[str, Follower] = {}
        self.refresh()

    def refresh(self) -> int:
        """Reads what is new and returns the number of records; cheap when there are none."""
        for folder in node_folders(log_dir(self.path), within=self.within):
            if folder not in self._followers:
                path = log_dir(self.path) / folder
                self._followers[folder] = Follower(path, within=self.within)
        num_new = 0
        for follower in self._followers.values():
            while records := follower.read():
                num_new += len(records)
                for record in records:
                    self._take(record)
        return num_new

    @property
    def num_damaged(self) -> int:
        return sum(follower.num_damaged for follower in self._followers.values())

    @property
    def last_step(self) -> int | None:
        """The newest step of the timeline."""
        newest = [step for attempt, before in self._visible(None) for step in attempt.steps if step < before]
        return max(newest, default=None)

    def names(self) -> list[str]:
        """The names of all metrics, sorted."""
        found = {name for attempt in self._attempts.values() for name in attempt.columns}
        return sorted(found | set(self._system.columns))

    def scalars(self, name: str, *, attempt: int | None = None) -> Series:
        """One metric; empty arrays if it was never logged.

        Args:
            name: As logged, such as `train/loss`.
            attempt: Shows the timeline as it stood in that attempt, before later ones replaced its steps.
        """
        if name in self._system.columns and not any(name in a.columns for a in self._attempts.values()):
            return self._system_series(name)
        parts = [part.series(name, before) for part, before in self._visible(attempt)]
        points = joined([part for part in parts if part is not None])
        return points.at(last_of_each_step(points.steps, np.ones(len(points.steps), dtype=np.bool_)))

    def last(self, name: str) -> float | None:
        """The metric's newest value."""
        values = self.scalars(name).values
        return float(values[-1]) if len(values) else None

    def layers(self, statistic: str) -> Layers:
        """A statistic of every parameter, such as `grad_norm`, from the records of kind `layers`."""
        rows = {r.step or 0: r.values[statistic] for r in self.visible("layers") if statistic in r.values}
        names = list(dict.fromkeys(name for row in rows.values() for name in row))
        values = [[_number(rows[step].get(name)) for name in names] for step in sorted(rows)]
        return Layers(
            np.array(sorted(rows), dtype=np.int64),
            names,
            np.array(values, dtype=np.float64).reshape(len(rows), len(names)),
        )

    def visible(self, kind: str) -> list[Record]:
        """The records of a kind (see `records`) that no later attempt replaced."""
        limits = self.limits()
        return [
            record
            for record in self.records.get(kind, [])
            if record.step is None or record.step < limits.get(record.attempt, np.inf)
        ]

    def to_pandas(
        self, names: Sequence[str] | None = None, *, attempt: int | None = None
    ) -> pandas.DataFrame:
        """One row per step, one column per metric; NaN where a metric has no value. Needs pandas."""
        try:
            import pandas
        except ImportError as error:
            raise TrackingError(
                "pandas is not installed", remedy="pip install 'stability-harness[analysis]'"
            ) from error
        columns = {}
        for name in self.names() if names is None else names:
            series = self.scalars(name, attempt=attempt)
            steps, last = np.unique(series.steps[::-1], return_index=True)
            columns[name] = pandas.Series(series.values[::-1][last], index=steps)
        frame = pandas.DataFrame(columns)
        return frame.rename_axis("step")

    def _take(self, record: Record) -> None:
        self._note(record)
        if record.kind == "system":
            self._system.add(0, record.time, record.values)
        elif record.kind in SCALAR_KINDS:
            self._take_scalars(record)
        elif record.kind in _KEPT_KINDS:
            self.records.setdefault(record.kind, []).append(record)

    def _take_scalars(self, record: Record) -> None:
        attempt = self._attempts.setdefault(record.attempt, _Attempt(record.attempt))
        step = record.step if record.step is not None else attempt.newest_step
        attempt.add(step, record.time, record.values)

    def _visible(self, until: int | None) -> list[tuple[_Attempt, float]]:
        """The attempts up to `until` that logged scalars, each with the step that a later one replaces."""
        return [
            (self._attempts[number], before)
            for number, before in self.limits(until).items()
            if number in self._attempts
        ]

    def _system_series(self, name: str) -> Series:
        """System metrics are sampled by time: each gets the step that was the newest at that moment."""
        column = self._system.columns[name]
        times = np.array(self._system.times)[np.array(column.rows, dtype=np.int64)]
        order = np.argsort(times, kind="stable")
        clock = self._clock()
        newest = np.searchsorted(clock.times, times[order], side="right") - 1
        steps = clock.steps[newest.clip(0)] if len(clock.steps) else np.zeros(len(order), dtype=np.int64)
        return Series(steps, np.array(column.values)[order], times[order])

    def _clock(self) -> Series:
        """The newest step at each record's time, ordered by time."""
        attempts = [self._attempts[number] for number in sorted(self._attempts)]
        parts = [Series(*map(np.array, (a.steps, [a.number] * len(a.steps), a.times))) for a in attempts]
        clock = joined(parts)
        clock = clock.at(np.argsort(clock.times, kind="stable"))
        return clock._replace(
            steps=newest_steps(clock.steps, clock.values.astype(np.int64), self._first_steps)
        )


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else np.nan
