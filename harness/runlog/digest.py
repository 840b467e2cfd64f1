"""A run as curves of bounded length: what a screen can show, with no spike left out.

    digest = Digest("runs/quickstart")
    digest.refresh()
    bands = digest.bands("train/loss", max_points=800)

Each point stands for some consecutive steps and carries the smallest, the mean and the largest value of them
and how many were not finite. Memory is bounded by the number of metrics and attempts, not by the length of
the run; where somebody looks closely, the steps themselves are read from the log again.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from harness.runlog.blocks import CLOCK, MADE, SYSTEM, Block, Blocks, measured
from harness.runlog.codec import Record, decode
from harness.runlog.log_follower import LogFollower
from harness.runlog.names import Prefix
from harness.runlog.paths import log_dir
from harness.runlog.series import Layers, Series, last_of_each_step
from harness.runlog.timeline import Timeline, line_of, newest_steps
from harness.runlog.traces import (
    ENTRY,
    TOTAL_SCALE,
    Entries,
    Trace,
    entries_of,
    merged,
    one_after_another,
    reduced,
    visible,
)

__all__ = ["NO_ENTRIES", "Bands", "Digest", "group_starts"]

READ_BYTES = 4 << 20
CLOSE_BYTES = 32 << 20
"""As much of a log is read again for one close look."""
MOST, MOST_OF_LAYERS = 8192, 2048
MOST_EVENTS = 10_000
MAX_COLUMNS = 400
MAX_NAMES = 50_000
"""Metrics of a run, those of layers and ranks included; some kB each."""


class Bands(NamedTuple):
    """One metric, reduced: equally long arrays, ordered by step."""

    steps: npt.NDArray[np.int64]
    """The first step that a point stands for."""
    times: npt.NDArray[np.float64]
    """Its time, in seconds since the epoch."""
    low: npt.NDArray[np.float64]
    mean: npt.NDArray[np.float64]
    high: npt.NDArray[np.float64]
    """Over finite values; NaN where there is none."""
    num_points: npt.NDArray[np.int64]
    num_nan: npt.NDArray[np.int64]
    num_inf: npt.NDArray[np.int64]


class Digest(Timeline):
    """A run whose metrics, those of layers and ranks included, are handed out as bands.

    Nothing is read before `refresh`.

    Attributes:
        read_frac: How much of the log has been read.
        num_bytes: Size in memory, about.
        num_left_out: Values of further metrics, where there are more than `MAX_NAMES`.
        is_preview: Whether only some places of the log were read, so that a spike may be missing.
    """

    is_preview = False
    most_events: int | None = MOST_EVENTS

    def __init__(self, run_dir: str | Path, *, within: Path | None = None) -> None:
        super().__init__(run_dir, within=within)
        self.read_frac = 0.0
        self.num_bytes = self.num_left_out = 0
        self._log = LogFollower(self.path, within=within)
        self._traces: dict[str, Trace] = {}
        self._blocks = Blocks(log_dir(run_dir), within=within)
        self._last_steps: dict[int, int] = {}
        self._ranks: Record | None = None

    def refresh(self, *, budget_s: float | None = None) -> bool:
        """Reads what is new, for `budget_s` at most; True when there is no more."""
        deadline = np.inf if budget_s is None else time.monotonic() + budget_s
        if not self._log.is_same_log():
            type(self).__init__(self, self.path, within=self.within)
            self._log.is_same_log()
        is_complete = True
        for folder, follower in self._log.followers():
            while records := follower.read(READ_BYTES):
                place = (folder, follower.began, follower.position)
                self._take(records, self._blocks.note(*place, self._last_steps))
                if time.monotonic() > deadline:
                    is_complete = False
                    break
        self.read_frac = 1.0 if is_complete else self._log.read_frac()
        self.num_bytes = self._size()
        return is_complete

    def bytes_behind(self) -> int:
        """How much of the log there is still to read."""
        return sum(unread for _, unread in self._log.sizes())

    def log_bytes(self) -> int:
        """Size of the whole log."""
        return sum(size for size, _ in self._log.sizes())

    def version(self) -> str:
        """Another one whenever more of the log has been read."""
        places = list(self._log.positions().items())
        known_by = repr((self.is_preview, self.started, self.updated, self.num_events, places))
        return hashlib.sha256(known_by.encode(errors="surrogateescape")).hexdigest()[:16]

    @property
    def num_damaged(self) -> int:
        """Complete lines that are no records; a healthy log has none."""
        return self._log.num_damaged

    @property
    def last_step(self) -> int | None:
        """The newest step of the timeline."""
        steps = self._shown(CLOCK)["last_step"]
        return int(steps.max()) if len(steps) else None

    def names(self) -> list[str]:
        """All metrics, those of layers and ranks included, sorted."""
        return sorted({name.removeprefix(MADE) for name in self._traces if name != CLOCK})

    def scalar_names(self) -> list[str]:
        """The metrics that were logged as such: without those that are made of layers and ranks, sorted."""
        return sorted(name for name in self._traces if not name.startswith(MADE))

    def last(self, name: str) -> float | None:
        """The metric's newest value."""
        trace = self._traces.get(self._key(name))
        if trace is None:
            return None
        is_of_newest_attempt = int(trace.newest["attempt"]) == max(self.attempts, default=SYSTEM)
        if is_of_newest_attempt and trace.newest["last_step"] == trace.last_step:
            return float(trace.newest["last"])
        shown = self._shown(self._key(name))
        return float(shown["last"][-1]) if len(shown) else None

    def ranks(self) -> dict[str, list[float]]:
        """Every rank's values at the newest step that has them; none right after a rollback."""
        record = self._ranks
        if record is None or (record.step or 0) >= self.limits().get(record.attempt, np.inf):
            return {}
        return record.values

    def bands(self, name: str, *, within: tuple[int, int] | None = None, max_points: int = 2000) -> Bands:
        """A metric, reduced to at most `max_points` points; empty arrays if it was never logged.

        Args:
            name: As logged, or else `layers/STATISTIC/PARAMETER`, `ranks/QUANTITY/max` and so on.
            within: First and last step; None for all.
            max_points: Where there are more steps, neighbouring ones share a point.
        """
        return self._bands(self._key(name), within, max_points)

    def _key(self, name: str) -> str:
        """Under which name a metric is kept: what was logged as such comes before what is made of layers."""
        return name if name in self._traces else f"{MADE}{name}"

    def _bands(self, key: str, within: tuple[int, int] | None, max_points: int) -> Bands:
        shown = self._shown(key, within=within, close_below=max_points)
        starts = group_starts(len(shown), max_points)
        count = reduced(shown["num_finite"], starts, np.add)
        num_nan, num_inf = (reduced(shown[name], starts, np.add) for name in ("num_nan", "num_inf"))
        low, total, high = (
            np.where(count == 0, np.nan, reduced(shown[name], starts, how))
            for name, how in (("low", np.minimum), ("total", np.add), ("high", np.maximum))
        )
        return Bands(
            shown["first_step"][starts],
            shown["time"][starts],
            low,
            np.clip(total / np.maximum(count, 1) / TOTAL_SCALE, low, high),
            high,
            count + num_nan + num_inf,
            num_nan,
            num_inf,
        )

    def layers(
        self, statistic: str, *, within: tuple[int, int] | None = None, max_columns: int | None = None
    ) -> Layers:
        """A statistic of every parameter, reduced to the largest value of each of at most `max_columns`.

        A column in which a parameter was not finite is infinite there.
        """
        most = max_columns or MAX_COLUMNS
        prefix = f"{MADE}{Prefix.LAYERS}{statistic}/"
        all_bands = {
            name.removeprefix(prefix): self._bands(name, within, most)
            for name in self._traces
            if name.startswith(prefix)
        }
        steps = np.unique(np.concatenate([bands.steps for bands in all_bands.values()] or [_NO_STEPS]))
        steps = steps[group_starts(len(steps), most)]  # parameters may be logged at different ones
        values = np.full((len(steps), len(all_bands)), np.nan)
        for row, bands in enumerate(all_bands.values()):
            odd = bands.num_nan + bands.num_inf > 0
            columns = np.searchsorted(steps, bands.steps, side="right") - 1
            np.fmax.at(values[:, row], columns, np.where(odd, np.inf, bands.high))
        return Layers(steps, list(all_bands), values)

    def dump(self) -> tuple[dict[str, Any], list[Entries]]:
        """All that is known of the log so far, as plain JSON data and arrays; `restore` takes it back."""
        about = {
            "head": self._log.head.hex(),
            "places": self._log.dump(),
            "folders": self._blocks.folders,
            "blocks": [tuple(block) for block in self._blocks.blocks],
            "num_left_out": self.num_left_out,
            "last_steps": list(self._last_steps.items()),
            "ranks": None if self._ranks is None else line_of(self._ranks),
            "traces": [
                (name, trace.width, len(trace.entries), trace.num_rest)
                for name, trace in self._traces.items()
            ],
        }
        return {**about, "timeline": self._account()}, [trace.entries for trace in self._traces.values()]

    def restore(self, about: Mapping[str, Any], entries: Entries) -> bool:
        """Takes back what `dump` told, its arrays in one; False if it was of another log, or only a part."""
        is_whole = sum(size for _, _, size, _ in about["traces"]) == len(entries)
        if not is_whole or not self._log.restore(bytes.fromhex(about["head"]), about["places"]):
            return False
        self._blocks.folders = about["folders"]
        self._blocks.blocks = [Block(*block) for block in about["blocks"]]
        self.num_left_out = int(about["num_left_out"])
        self._last_steps = dict(about["last_steps"])
        self._ranks = None if about["ranks"] is None else decode(about["ranks"].encode())
        begin = 0
        for name, width, size, num_rest in about["traces"]:
            mine = entries[begin : begin + size]
            self._traces[name] = Trace.restored(
                mine,
                width=width,
                num_rest=num_rest,
                most=_most(name),
                replaces=_replaces(name, int(mine["attempt"][0])),
            )
            begin += size
        self._take_account(about["timeline"])
        self.read_frac, self.num_bytes = self._log.read_frac(), self._size()
        return True

    def _take(self, records: list[Record], block: int) -> None:
        for record in records:
            self._note(record)
            if record.kind == "ranks":
                self._ranks = record
        for attempt, metrics in measured(records, self._last_steps):
            for name, series in metrics.items():
                self._add(name, attempt, series, block)

    def _add(self, name: str, attempt: int, series: Series, block: int) -> None:
        if name not in self._traces:
            if len(self._traces) >= MAX_NAMES and name != CLOCK:
                self.num_left_out += len(series.steps)
                return
            self._traces[name] = Trace(_most(name), replaces=_replaces(name, attempt))
        self._traces[name].add(entries_of(series, attempt=attempt, block=block))

    def _shown(self, name: str, *, within: tuple[int, int] | None = None, close_below: int = 0) -> Entries:
        """The metric's entries on the timeline, ordered by step.

        Args:
            within: First and last step; None for all.
            close_below: Where there are fewer entries than that, the steps themselves are read.
        """
        trace = self._traces.get(name)
        if trace is None:
            return NO_ENTRIES
        entries = self._dated(trace.entries)
        whole, cut = visible(entries, self.limits(), within)
        touched = entries if whole.all() else entries[whole | cut]
        if trace.width == 1 or not len(touched):
            return _in_order(touched)
        if len(touched) < close_below and self._is_near(touched):
            return _in_order(self._points(name, touched, within))
        if whole.all():
            return _in_order(entries)
        pieces = [self._points(name, entries[at : at + 1], within) for at in np.flatnonzero(cut)]
        return _in_order(one_after_another([entries[whole], *(_as_one(piece) for piece in pieces)]))

    def _is_near(self, entries: Entries) -> bool:
        """Whether little enough of the log has to be read to see the points of these entries."""
        return self._blocks.size(self._blocks_of(entries)) <= CLOSE_BYTES

    def _blocks_of(self, entries: Entries) -> list[int]:
        spans = zip(entries["first_block"].tolist(), entries["last_block"].tolist(), strict=True)
        return sorted({number for first, last in spans for number in self._blocks.between(first, last)})

    def _points(self, name: str, entries: Entries, within: tuple[int, int] | None) -> Entries:
        """The points that some entries stand for, read from the log again; those that are shown.

        Entries that are too many bytes of log apart are taken as they are.
        """
        if not self._is_near(entries):
            return entries
        attempts = np.unique(entries["attempt"]).tolist()
        points = [
            entries_of(series, attempt=attempt, block=number)
            for number in self._blocks_of(entries)
            for attempt in attempts
            if (series := self._blocks.read(number).get((attempt, name))) is not None
        ]
        if not points:
            return NO_ENTRIES
        found = self._dated(one_after_another(points))
        whole, _ = visible(found, self.limits(), within)
        lowest, highest = entries["first_step"].min(), entries["last_step"].max()
        shown: Entries = found[whole & (found["first_step"] >= lowest) & (found["first_step"] <= highest)]
        return shown

    def _dated(self, entries: Entries) -> Entries:
        """Samples of a node are taken by time: each gets the step that was the newest at that moment."""
        of_node = entries["attempt"] == SYSTEM
        if not of_node.all():
            own: Entries = entries[~of_node]  # somebody's metric may have a sample's name
            return own
        clock = self._traces[CLOCK].entries if CLOCK in self._traces else NO_ENTRIES
        dated = entries.copy()
        if len(clock):
            newest = np.searchsorted(np.maximum.accumulate(clock["time"]), entries["time"], side="right") - 1
            steps = newest_steps(clock["first_step"], clock["attempt"], self._first_steps)
            dated["first_step"] = dated["last_step"] = steps[newest.clip(0)]
        return dated

    def _size(self) -> int:
        return self._events_bytes + sum(trace.num_bytes for trace in self._traces.values())


_NO_STEPS = np.empty(0, dtype=np.int64)
NO_ENTRIES = np.empty(0, dtype=ENTRY)


def _most(name: str) -> int:
    return MOST_OF_LAYERS if name.startswith(f"{MADE}{Prefix.LAYERS}") else MOST


def _replaces(name: str, attempt: int) -> bool:
    """Whether a later point of a step replaces an earlier one; samples and ticks of the clock have a time."""
    return name != CLOCK and attempt != SYSTEM


def _as_one(entries: Entries) -> Entries:
    return merged(entries, group_starts(len(entries), 1))


def _in_order(entries: Entries) -> Entries:
    """By step; of points with the same step the one written last, but all samples of a node, by time."""
    steps = entries["first_step"]
    if len(entries) and entries["attempt"][0] == SYSTEM:
        samples: Entries = entries[np.lexsort((entries["time"], steps))]
        return samples
    if (steps[1:] > steps[:-1]).all():  # as it nearly always is
        return entries
    is_points = bool((entries["num_finite"] + entries["num_nan"] + entries["num_inf"] == 1).all())
    if is_points:
        return entries[last_of_each_step(steps, np.ones(len(steps), dtype=np.bool_))]
    return entries[np.argsort(steps, kind="stable")]


def group_starts(length: int, most: int) -> npt.NDArray[np.int64]:
    """Where each of at most `most` equal parts begins."""
    width = max(1, -(-length // most))
    return np.arange(0, length, width, dtype=np.int64)
