"""Reads a run's log: one consistent timeline, or the branches that restarts and rollbacks abandoned.

    run = open_run("runs/quickstart")
    steps, values, times = run.scalars("train/loss")
    while run.state() == "running":
        run.refresh()

A rewind abandons what was logged for its step and everything after it; nothing else does. Of a step that was
logged more than once the later value of each metric holds. Nothing here writes, and a log that is being
written can be read at any time.

A run is held as its digest, whose size is bounded; the steps of a metric of a long run are read from the log
when somebody asks for them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.errors import TrackingError
from harness.runlog.blocks import CLOCK, SYSTEM
from harness.runlog.codec import Record, decode
from harness.runlog.digest import Digest, group_starts
from harness.runlog.events import Event
from harness.runlog.paths import log_dir
from harness.runlog.segments import segments
from harness.runlog.series import Layers, Series, joined, last_of_each_step
from harness.runlog.timeline import State, newest_steps
from harness.runlog.traces import Entries

if TYPE_CHECKING:
    import pandas

__all__ = ["Event", "Layers", "Run", "Series", "State", "is_run", "no_run", "open_run", "unreadable"]

COLUMNS_BYTES = 128 << 20
"""As many metrics of a long run are read and kept at once as fit into this, at `POINT_BYTES` a step."""
POINT_BYTES = 24
STRETCH_BYTES = 8 << 20
"""How much of a log `stretches` reads at once."""

_NO_STEPS = np.empty(0, dtype=np.int64)
WHOLE_KINDS = frozenset({"text", "image", "histogram", "graph", "layers", "ranks"})
"""Records that are more than some numbers; see `Run.records`."""

Parts = list[tuple[int, Series]]
"""A metric's points as they were written, each part of one attempt."""


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


class Run(Digest):
    """A run as its log tells it, each step of it; `refresh` reads on from where it stopped."""

    most_events = None  # an export holds them all

    def __init__(self, run_dir: str | Path, *, within: Path | None = None) -> None:
        super().__init__(run_dir, within=within)
        self._columns: dict[str, Parts] = {}
        """Metrics whose steps have been read from the log again; `refresh` adds to them."""
        self.refresh()

    def names(self) -> list[str]:
        """The metrics that were logged as such, sorted; see `scalar_names`."""
        return self.scalar_names()

    def sample_names(self) -> list[str]:
        """Those among them that are samples of nodes, such as `system/cpu_frac`."""
        return [name for name in self.names() if self._is_samples(name)]

    def scalars(self, name: str, *, attempt: int | None = None) -> Series:
        """One metric; empty arrays if it was never logged.

        Of a long run the log is read again, for this metric and for as many of those that follow by name as
        fit into `COLUMNS_BYTES`: some seconds for every GB.

        Args:
            name: As logged, such as `train/loss`.
            attempt: Shows the timeline as it stood in that attempt, before later ones replaced its steps.
        """
        parts = self._parts(self._key(name))
        own = [part for part in parts if part[0] != SYSTEM]  # somebody's metric may have a sample's name
        if parts and not own:
            return self._dated_by_clock(joined([series for _, series in parts]))
        return _on_timeline(own, self.limits(attempt))

    def stretches(self) -> list[tuple[int, int]]:
        """First and last steps of consecutive stretches that cover the timeline, of about equally many points
        each: some MB of log."""
        # By points, not by steps: a step in which all layers were logged weighs thousands of plain ones.
        most = max(1, self.log_bytes() // STRETCH_BYTES)
        steps, weights, last = [_NO_STEPS], [_NO_STEPS], 0
        for name in self.names():
            entries = self._own_entries(name)
            starts = group_starts(len(entries), 4 * most)
            steps.append(entries["first_step"][starts])
            weights.append(np.diff(starts, append=len(entries)) * self._traces[name].width)
            last = max(last, int(entries["last_step"].max(initial=0)))
        ordered = np.argsort(all_steps := np.concatenate(steps), kind="stable")
        if not len(ordered):
            return []
        filled = np.cumsum(np.concatenate(weights)[ordered])
        begins = np.searchsorted(filled, filled[-1] * np.arange(1, most) / most)
        firsts = np.unique(np.append(all_steps.min(), all_steps[ordered[begins]]))
        lasts = np.append(firsts[1:] - 1, last)
        return list(zip(firsts.tolist(), lasts.tolist(), strict=True))

    def between(self, first: int, last: int) -> dict[str, Series]:
        """All metrics of `scalar_names` from step `first` to `last`, read from the log again, but for samples
        of nodes.

        Each metric says where its steps are written: some may count epochs where others count steps.
        """
        parts: dict[str, Parts] = {}
        unread: set[str] = set()
        numbers: set[int] = set()
        for name in self.names():
            entries = self._own_entries(name)
            touched = entries[(entries["first_step"] <= last) & (entries["last_step"] >= first)]
            if self._traces[name].width == 1:  # an entry is a point still: nothing to read again
                parts[name] = _parts_of(touched)
            else:
                unread.add(name)
                numbers.update(self._blocks_of(touched))
        for number in sorted(numbers):
            for (attempt, name), series in self._blocks.read(number, has_scalars_only=True).items():
                if attempt != SYSTEM and name in unread:
                    within = (series.steps >= first) & (series.steps <= last)
                    parts.setdefault(name, []).append((attempt, series.at(within)))
        parts = {name: some for name, some in parts.items() if some}
        return {name: _on_timeline(some, self.limits()) for name, some in sorted(parts.items())}

    def layers(
        self, statistic: str, *, within: tuple[int, int] | None = None, max_columns: int | None = None
    ) -> Layers:
        """A statistic of every parameter, such as `grad_norm`, from the records of kind `layers`: every
        one of them, or reduced as in a digest."""
        if within is not None or max_columns is not None:
            return super().layers(statistic, within=within, max_columns=max_columns)
        rows = {r.step or 0: r.values[statistic] for r in self.visible("layers") if statistic in r.values}
        names = list(dict.fromkeys(name for row in rows.values() for name in row))
        values = [[_number(rows[step].get(name)) for name in names] for step in sorted(rows)]
        return Layers(
            np.array(sorted(rows), dtype=np.int64),
            names,
            np.array(values, dtype=np.float64).reshape(len(rows), len(names)),
        )

    @property
    def records(self) -> Mapping[str, list[Record]]:
        """Records by kind, such as `text`, `image`, `histogram` or `ranks`, in the order of writing.

        A kind is read from the log when it is asked for.
        """
        return _Records(self._records_of)

    def visible(self, kind: str) -> list[Record]:
        """The records of a kind that no later attempt replaced."""
        limits = self.limits()
        return [
            record
            for record in self.written(kind)
            if record.step is None or record.step < limits.get(record.attempt, np.inf)
        ]

    def written(self, kind: str) -> list[Record]:
        """The records of a kind in the order of writing, those of abandoned branches among them; read from
        the log again."""
        return self._records_of(kind)

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

    def _records_of(self, kind: str) -> list[Record]:
        mark = f'"{kind}"'.encode()  # few lines hold it: the others need not be decoded
        lines = (line for number in range(len(self._blocks.blocks)) for line in self._blocks.lines(number))
        found = (decode(line) for line in lines if mark in line)
        return [record for record in found if record is not None and record.kind == kind]

    def _add(self, name: str, attempt: int, series: Series, block: int) -> None:
        super()._add(name, attempt, series, block)
        if name in self._columns:  # else it is read, this part too, when it is asked for
            self._columns[name].append((attempt, series))

    def _parts(self, name: str) -> Parts:
        """A metric as it was written: from its trace while that has an entry for each point."""
        trace = self._traces.get(name)
        if trace is None:
            return []
        if trace.width == 1:
            return _parts_of(trace.entries)
        if name not in self._columns:
            self._columns = self._read_columns(name)
        return self._columns[name]

    def _read_columns(self, name: str) -> dict[str, Parts]:
        """The metric, and those that are likely to be asked for next."""
        sizes = {each: trace.num_points * POINT_BYTES for each, trace in self._traces.items()}
        names = [each for each in self.names() if self._traces[each].width > 1]
        clock = [CLOCK] if self._is_samples(name) else []
        # A pass over the log costs the same for one metric as for many, and who asks for one asks for the
        # next by name: an export does.
        columns: dict[str, Parts] = {}
        for each in [name, *clock, *(n for n in names if n > name), *names]:
            if each in (name, CLOCK) or sum(sizes[n] for n in columns) + sizes[each] <= COLUMNS_BYTES:
                columns.setdefault(each, [])
        for number in range(len(self._blocks.blocks)):
            for (attempt, each), series in self._blocks.decode(number).items():
                if each in columns:
                    columns[each].append((attempt, series))
        return columns

    def _is_samples(self, name: str) -> bool:
        return bool((self._traces[name].entries["attempt"] == SYSTEM).all())

    def _own_entries(self, name: str) -> Entries:
        """The metric's entries but for samples of nodes, in the order of writing."""
        entries = self._traces[name].entries
        is_own = entries["attempt"] != SYSTEM
        own: Entries = entries if is_own.all() else entries[is_own]
        return own

    def _dated_by_clock(self, samples: Series) -> Series:
        """Samples of a node are taken by time: each gets the step that was the newest at that moment."""
        samples = samples.at(np.argsort(samples.times, kind="stable"))
        ticks = self._parts(CLOCK)
        clock = joined([series for _, series in ticks])
        if not len(clock.steps):
            return samples._replace(steps=np.zeros(len(samples.steps), dtype=np.int64))
        attempts = np.repeat([attempt for attempt, _ in ticks], [len(series.steps) for _, series in ticks])
        order = np.argsort(clock.times, kind="stable")
        steps = newest_steps(clock.steps[order], attempts[order], self._first_steps)
        newest = np.searchsorted(clock.times[order], samples.times, side="right") - 1
        return samples._replace(steps=steps[newest.clip(0)])


class _Records(Mapping[str, list[Record]]):
    def __init__(self, read: Callable[[str], list[Record]]) -> None:
        self._read = read

    def __getitem__(self, kind: str) -> list[Record]:
        records = self._read(kind) if kind in WHOLE_KINDS else []
        if not records:
            raise KeyError(kind)
        return records

    def __iter__(self) -> Iterator[str]:
        return (kind for kind in sorted(WHOLE_KINDS) if self._read(kind))

    def __len__(self) -> int:
        return len(list(iter(self)))


def _on_timeline(parts: Parts, limits: Mapping[int, float]) -> Series:
    """What of a metric no later attempt replaced, by step; the later one of values of the same step."""
    points = joined([series for _, series in parts])
    keep = [series.steps < limits.get(attempt, -np.inf) for attempt, series in parts]
    return points.at(last_of_each_step(points.steps, np.concatenate(keep or [np.empty(0, dtype=np.bool_)])))


def _parts_of(entries: Entries) -> Parts:
    """Entries of one point each as parts."""
    begins = [0, *(np.flatnonzero(np.diff(entries["attempt"])) + 1).tolist(), len(entries)]
    return [
        (int(some["attempt"][0]), Series(some["first_step"], some["last"], some["time"]))
        for begin, end in itertools.pairwise(begins)
        if len(some := entries[begin:end])
    ]


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else np.nan
