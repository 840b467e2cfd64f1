"""What a log tells of a run beside its curves: attempts, process, settings, events, and how it ended."""

from __future__ import annotations

import itertools
import time
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from harness.runlog.codec import Record, decode, encode
from harness.runlog.events import Event
from harness.runlog.ledger import Ledger
from harness.runlog.names import EventName
from harness.runlog.process import is_alive
from harness.runlog.soundness import SCALAR_KINDS

__all__ = ["SCALAR_KINDS", "State", "Timeline", "line_of", "newest_steps"]

State = Literal["running", "finished", "crashed", "stopped", "unstable", "stale"]
STALE_AFTER_S = 600.0
"""A run that has been silent for so long is not called running any more."""


class Timeline:
    """Keeps account of a run's records; those who read a log build on it.

    Attributes:
        path: The run directory.
        within: A folder below which no link is followed; None: links are.
        info: What the newest attempt's `run` records say: process, host, command, and what the trainer added.
        hparams: All hyperparameters logged, later values over earlier ones.
        started: Time of the first record, in seconds since the epoch; `updated`: of the newest.
        attempt_starts: Time of each attempt's first record.
        num_events: How many events there have been, and how many of them are incidents: `num_incidents`.
        most_events: Above twice that many only so many of the newest are held, and half as many incidents
            from before them; None: all are.
    """

    most_events: int | None = None

    def __init__(self, run_dir: str | Path, *, within: Path | None = None) -> None:
        self.path = Path(run_dir)
        self.within = within
        self.info: dict[str, Any] = {}
        self.hparams: dict[str, Any] = {}
        self.started: float | None = None
        self.updated: float | None = None
        self.attempt_starts: dict[int, float] = {}
        self._first_steps: dict[int, int] = {}
        self._events: list[Record] = []
        self._events_bytes = 0
        self.num_events = self.num_incidents = 0
        self._end: dict[str, Any] | None = None
        self._ledger: Record | None = None

    @property
    def ledger(self) -> Ledger | None:
        """Where the run's wall time went; None in logs of loops and releases that keep no account of it."""
        return None if self._ledger is None else Ledger.of(self._ledger)

    @property
    def attempts(self) -> list[int]:
        """Numbers of the attempts that there have been, in order."""
        return sorted(self.attempt_starts)

    @property
    def end(self) -> dict[str, Any] | None:
        """What the `end` record of the newest attempt says, if there is one."""
        return self._end

    def limits(self, until: int | None = None) -> dict[int, float]:
        """The attempts in order, each with the step from which on a later one replaces it.

        Args:
            until: Leaves later attempts out, as if they had not been.
        """
        limits: dict[int, float] = {}
        before = np.inf
        for number in reversed(self.attempts):
            if until is None or number <= until:
                limits[number] = before
                before = min(before, self._first_steps.get(number, np.inf))
        return dict(reversed(limits.items()))

    def events(self, name: str | None = None) -> list[Event]:
        """Everything that happened, by time; only events called `name` if that is given.

        Of very many the older ones are left out; see `most_events`.
        """
        limits = self.limits()
        return [
            Event(
                name=str(record.values.get("name", "event")),
                step=record.step,
                time=record.time,
                attempt=record.attempt,
                details={k: v for k, v in record.values.items() if k != "name"},
                abandoned=record.step is not None and record.step >= limits.get(record.attempt, np.inf),
            )
            for record in sorted(self._events, key=lambda record: record.time)
            if name is None or record.values.get("name") == name
        ]

    def state(self, *, now: float | None = None) -> State:
        """What has become of the run.

        `finished`, `stopped`, `unstable` or `crashed` as it said itself; `crashed` too if its process is gone
        without a word; `stale` if nothing was logged for ten minutes, or on another machine so that nobody
        can tell.
        """
        if self._end is not None:
            said = self._end.get("state")
            return said if said in ("finished", "stopped", "unstable", "crashed") else "finished"
        if is_alive(self.info) is False:
            return "crashed"
        silent_s = (now or time.time()) - (self.updated or 0.0)
        return "running" if silent_s < STALE_AFTER_S else "stale"

    def _account(self) -> dict[str, Any]:
        """All of it as plain JSON data; `_take_account` takes it back."""
        said = [("run", self.info), ("hparams", self.hparams), *([("end", self._end)] if self._end else [])]
        records = [Record(kind, 0, None, 0.0, values) for kind, values in said]
        ledger = [self._ledger] if self._ledger else []
        return {
            "records": [line_of(record) for record in (*records, *ledger, *self._events)],
            "num_events": (self.num_events, self.num_incidents),
            "times": (self.started, self.updated),
            "attempt_starts": list(self.attempt_starts.items()),
            "first_steps": list(self._first_steps.items()),
        }

    def _take_account(self, account: Mapping[str, Any]) -> None:
        for record in map(decode, (line.encode() for line in account["records"])):
            if record is not None:
                self._note(record)
        self.num_events, self.num_incidents = account["num_events"]
        self.started, self.updated = account["times"]
        self.attempt_starts = dict(account["attempt_starts"])
        self._first_steps = dict(account["first_steps"])

    def _note(self, record: Record) -> None:
        """Takes account of a record; what it measures is left to whoever builds on this."""
        self.started = record.time if self.started is None else self.started
        if record.kind == "event":
            self._take_event(record)
        if record.kind in ("event", "system"):  # the side process may have written it, after the run's end
            return
        self.updated = record.time
        self.attempt_starts.setdefault(record.attempt, record.time)
        if record.kind == "rewind":
            self._begins_at(record.attempt, int(record.values["step"]))
        elif record.kind == "step" and record.step == 0 and self._is_unmarked_restart(record.attempt):
            self._begins_at(record.attempt, 0)
        elif record.kind == "run":
            self.info = {**self.info, **record.values}
            self._end = None if "pid" in record.values else self._end
        elif record.kind == "ledger":
            self._ledger = record
        elif record.kind == "hparams":
            self.hparams.update(record.values)
        elif record.kind == "end":
            self._end = record.values

    def _take_event(self, record: Record) -> None:
        self.num_events += 1
        self.num_incidents += _is_incident(record)
        self._events.append(record)
        self._events_bytes += _event_bytes(record)
        if self.most_events is not None and len(self._events) > 2 * self.most_events:
            older, newest = self._events[: -self.most_events], self._events[-self.most_events :]
            self._events = [*filter(_is_incident, older)][-(self.most_events // 2) :] + newest
            self._events_bytes = sum(map(_event_bytes, self._events))

    def _begins_at(self, attempt: int, step: int) -> None:
        self._first_steps[attempt] = min(step, self._first_steps.get(attempt, step))

    def _is_unmarked_restart(self, attempt: int) -> bool:
        """In logs of earlier releases: a training that began again at step 0 wrote no `rewind`."""
        is_training = "config" in self.info and "experiment" not in self.info
        return is_training and attempt not in self._first_steps and attempt > min(self.attempt_starts)


def _is_incident(record: Record) -> bool:
    return record.values.get("name") == EventName.INCIDENT


def _event_bytes(record: Record) -> int:
    """Size in memory, about: as text, and of the objects."""
    return 512 + 2 * len(line_of(record))


def newest_steps(
    steps: npt.NDArray[np.int64], attempts: npt.NDArray[np.int64], rewound: Container[int]
) -> npt.NDArray[np.int64]:
    """For each record, in the order of writing, the newest step up to then: only a rewind makes it smaller.

    Args:
        rewound: The attempts that began with a rewind.
    """
    newest = steps.copy()
    changes = np.flatnonzero(np.diff(attempts)) + 1
    begins = [0, *(int(at) for at in changes if int(attempts[at]) in rewound), len(steps)]
    for begin, end in itertools.pairwise(begins):
        np.maximum.accumulate(steps[begin:end], out=newest[begin:end])
    return newest


def line_of(record: Record) -> str:
    """The record as it stands in a log."""
    kind, values = record.kind, record.values
    return encode(kind, values, attempt=record.attempt, step=record.step, time=record.time).decode()
