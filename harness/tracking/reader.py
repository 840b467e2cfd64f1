"""Reads a run's log: one consistent timeline, or the branches that restarts and rollbacks abandoned.

    run = open_run("runs/quickstart")
    steps, values, times = run.scalars("train/loss")
    while run.state() == "running":
        run.refresh()

A later attempt replaces what earlier ones logged for its first step and everything after it. Nothing here
writes, and a log that is being written can be read at any time.
"""

from __future__ import annotations

import dataclasses
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from harness.errors import TrackingError
from harness.tracking.codec import Record
from harness.tracking.log import log_dir
from harness.tracking.process import is_alive
from harness.tracking.segments import Follower, segments

if TYPE_CHECKING:
    import pandas

__all__ = ["Event", "Layers", "Run", "Series", "State", "is_run", "open_run"]

State = Literal["running", "finished", "crashed", "stopped", "stale"]
STALE_AFTER_S = 600.0
"""A run that has been silent for so long is not called running any more."""
_SCALAR_KINDS = frozenset({"step", "eval", "epoch"})


class Series(NamedTuple):
    """One metric over the run: equally long arrays, ordered by step, each step once."""

    steps: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]
    times: npt.NDArray[np.float64]
    """Seconds since the epoch."""


class Layers(NamedTuple):
    """One statistic of every parameter over the run."""

    steps: npt.NDArray[np.int64]
    names: list[str]
    values: npt.NDArray[np.float64]
    """[step, name]; NaN where a step did not log the parameter."""


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """An incident, checkpoint, resume, fault, stop, rollback or alert."""

    name: str
    step: int | None
    time: float
    attempt: int
    details: dict[str, Any]
    abandoned: bool
    """It happened on a branch that a later attempt replaced. It did happen, so it is listed all the same."""

    @property
    def text(self) -> str:
        """What happened, in one line: the event's own summary, or its details one after another."""
        details = (f"{name} {value}" for name, value in self.details.items() if value is not None)
        return str(self.details.get("summary") or ", ".join(details))


class _Column:
    __slots__ = ("rows", "values")

    def __init__(self) -> None:
        self.rows = array("q")
        self.values = array("d")


class _Attempt:
    """What one attempt logged; rows are records, columns refer to rows."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.first_step: int | None = None
        self.steps = array("q")
        self.times = array("d")
        self.columns: dict[str, _Column] = {}

    def begins_at(self, step: int) -> None:
        if self.first_step is None or step < self.first_step:
            self.first_step = step

    def add(self, step: int, time: float, values: dict[str, Any]) -> None:
        row = len(self.steps)
        self.steps.append(step)
        self.times.append(time)
        for name, value in values.items():
            if isinstance(value, (float, int)):
                column = self.columns.get(name)
                if column is None:
                    column = self.columns[name] = _Column()
                column.rows.append(row)
                column.values.append(value)

    def series(self, name: str, before: float) -> Series | None:
        """The metric's points at steps less than `before`; the last one written of each step."""
        column = self.columns.get(name)
        if column is None:
            return None
        rows = np.array(column.rows, dtype=np.int64)
        points = Series(
            np.array(self.steps, dtype=np.int64)[rows], np.array(column.values), np.array(self.times)[rows]
        )
        return _select(points, _last_of_each(points.steps, points.steps < before))


def open_run(run_dir: str | Path) -> Run:
    """Reads the log of a run directory.

    Raises:
        TrackingError: there is no log in it.
    """
    if not is_run(run_dir):
        raise TrackingError(
            f"{run_dir} is not a run",
            rule="a run directory holds a folder `log`",
            remedy="`harness runs` lists the runs that there are",
        )
    return Run(run_dir)


def is_run(run_dir: str | Path) -> bool:
    """Whether the directory holds a log."""
    return bool(segments(log_dir(run_dir)))


class Run:
    """A run as its log tells it; `refresh` reads on from where it stopped.

    Attributes:
        info: What the newest attempt's `run` records say: process, host, command, and what the trainer added.
        hparams: All hyperparameters logged, later values over earlier ones.
        records: Records that are not scalars (`text`, `image`, `histogram`, `graph`, `layers`, `ranks`), by
            kind, in the order of writing.
        num_damaged: Complete lines that are no records; a healthy log has none.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.path = Path(run_dir)
        self.info: dict[str, Any] = {}
        self.hparams: dict[str, Any] = {}
        self.records: dict[str, list[Record]] = {}
        self.started: float | None = None
        self.updated: float | None = None
        self.attempt_starts: dict[int, float] = {}
        self._attempts: dict[int, _Attempt] = {}
        self._system = _Attempt(0)
        self._events: list[Record] = []
        self._end: dict[str, Any] | None = None
        self._followers = {log_dir(run_dir): Follower(log_dir(run_dir))}
        self.refresh()

    def refresh(self) -> int:
        """Reads what is new and returns the number of records; cheap when there are none."""
        for node in log_dir(self.path).glob("nodes/*"):
            if node not in self._followers:
                self._followers[node] = Follower(node)
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
    def attempts(self) -> list[int]:
        """Numbers of the attempts that there have been, in order."""
        return sorted(self._attempts)

    @property
    def last_step(self) -> int | None:
        """The newest step of the timeline."""
        newest = [step for attempt, before in self._visible(None) for step in attempt.steps if step < before]
        return max(newest, default=None)

    @property
    def end(self) -> dict[str, Any] | None:
        """What the `end` record of the newest attempt says, if there is one."""
        return self._end

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
        if name in self._system.columns:
            return self._system_series(name)
        parts = [part.series(name, before) for part, before in self._visible(attempt)]
        return _joined([part for part in parts if part is not None])

    def last(self, name: str) -> float | None:
        """The metric's newest value."""
        values = self.scalars(name).values
        return float(values[-1]) if len(values) else None

    def events(self, name: str | None = None) -> list[Event]:
        """Everything that happened, by time; only events called `name` if that is given."""
        before = {part.number: limit for part, limit in self._visible(None)}
        return [
            Event(
                name=str(record.values.get("name", "event")),
                step=record.step,
                time=record.time,
                attempt=record.attempt,
                details={k: v for k, v in record.values.items() if k != "name"},
                abandoned=record.step is not None and record.step >= before.get(record.attempt, np.inf),
            )
            for record in sorted(self._events, key=lambda record: record.time)
            if name is None or record.values.get("name") == name
        ]

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
        before = {part.number: limit for part, limit in self._visible(None)}
        return [
            record
            for record in self.records.get(kind, [])
            if record.step is None or record.step < before.get(record.attempt, np.inf)
        ]

    def state(self, *, now: float | None = None) -> State:
        """What has become of the run.

        `finished`, `stopped` or `crashed` as it said itself; `crashed` too if its process is gone without a
        word; `stale` if nothing was logged for ten minutes, or on another machine so that nobody can tell.
        """
        if self._end is not None:
            said = self._end.get("state")
            return said if said in ("finished", "stopped", "crashed") else "finished"
        if is_alive(self.info) is False:
            return "crashed"
        silent_s = (now or time.time()) - (self.updated or 0.0)
        return "running" if silent_s < STALE_AFTER_S else "stale"

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
        self.started = record.time if self.started is None else self.started
        if record.kind == "system":
            self._system.add(0, record.time, record.values)
            return
        if record.kind == "event":
            self._events.append(record)
            return
        self.updated = record.time
        self._attempts.setdefault(record.attempt, _Attempt(record.attempt))
        self.attempt_starts.setdefault(record.attempt, record.time)
        if record.kind in _SCALAR_KINDS:
            self._take_scalars(record)
        elif record.kind == "rewind":
            self._attempts[record.attempt].begins_at(int(record.values["step"]))
        elif record.kind == "run":
            self.info = {**self.info, **record.values}
            self._end = None if "pid" in record.values else self._end
        elif record.kind == "hparams":
            self.hparams.update(record.values)
        elif record.kind == "end":
            self._end = record.values
        else:
            self.records.setdefault(record.kind, []).append(record)

    def _take_scalars(self, record: Record) -> None:
        attempt = self._attempts[record.attempt]
        if record.step is not None:
            attempt.begins_at(record.step)
        step = record.step if record.step is not None else (attempt.steps[-1] if attempt.steps else 0)
        attempt.add(step, record.time, record.values)

    def _visible(self, until: int | None) -> list[tuple[_Attempt, float]]:
        """The attempts up to `until`, each with the step at which a later one takes over."""
        result: list[tuple[_Attempt, float]] = []
        before = np.inf
        for number in reversed(self.attempts):
            if until is not None and number > until:
                continue
            attempt = self._attempts[number]
            result.append((attempt, before))
            if attempt.first_step is not None:
                before = min(before, attempt.first_step)
        return result[::-1]

    def _system_series(self, name: str) -> Series:
        """System metrics are sampled by time: each gets the step that was the newest at that moment."""
        column = self._system.columns[name]
        times = np.array(self._system.times)[np.array(column.rows, dtype=np.int64)]
        order = np.argsort(times, kind="stable")
        clock = _joined([Series(*map(np.array, (a.steps, a.steps, a.times))) for a, _ in self._visible(None)])
        by_time = np.argsort(clock.times, kind="stable")
        newest = np.searchsorted(clock.times[by_time], times[order], side="right") - 1
        steps = clock.steps[by_time][newest.clip(0)] if len(by_time) else np.zeros(len(order), dtype=np.int64)
        return Series(steps, np.array(column.values)[order], times[order])


def _last_of_each(steps: npt.NDArray[np.int64], keep: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Indices that sort the kept steps, the last one of equal ones."""
    kept = np.flatnonzero(keep)
    order = kept[np.argsort(steps[kept], kind="stable")]
    ordered = steps[order]
    return order[np.append(ordered[1:] != ordered[:-1], True)] if len(order) else order


def _select(series: Series, index: npt.NDArray[np.int64]) -> Series:
    return Series(series.steps[index], series.values[index], series.times[index])


def _joined(parts: list[Series]) -> Series:
    if not parts:
        return Series(np.array([], dtype=np.int64), np.array([]), np.array([]))
    return Series(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else np.nan
