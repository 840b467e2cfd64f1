"""What a run's log says of the step that is to be replayed, and of the way to it."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from harness.config import TrainConfig
from harness.errors import ReplayError
from harness.runlog.events import Event, Incident, Rollback
from harness.runlog.names import EventName, Metric
from harness.runlog.paths import config_file
from harness.runlog.reader import Run, open_run

__all__ = ["History", "read_history"]

Values = Mapping[int, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """The step that is replayed, as the run's log tells of it and of what came before."""

    step: int
    attempt: int
    """The stretch of the run that the step belongs to; of a step that was run several times, the last one in
    which it was an incident."""
    config: TrainConfig
    """As that attempt ran."""
    about: Mapping[str, Any]
    """What the attempt noted of itself: world size, device, threads, precision, versions."""
    incident: Incident | None
    """What the log says was wrong with the step."""
    unplayable: tuple[str, ...]
    """Kinds of the step's incidents, where none is of its numbers: a straggler, say."""
    values: Mapping[str, Values]
    """Metrics by name and step, of this branch of the run."""
    bad_elements: Mapping[str, int]
    """NaN and Inf elements of each parameter's gradient at the step, where there are any."""
    rollbacks: tuple[Event, ...]
    """Those before the step."""
    until: float
    """Checkpoints that were written later than this are of another branch."""
    owners: Mapping[int, float]
    """The attempts up to this one, with the step from which on a later one of them replaces it."""
    reached: Mapping[int, int]
    """The last step that each of them has logged."""

    @property
    def world_size(self) -> int:
        """Ranks of the attempt."""
        return int(self.about.get("world_size", 1))

    def was_visited_before(self, step: int) -> bool:
        """Whether an earlier attempt has run `step`: a rehearsed fault has struck then."""
        owner = next((a for a, limit in self.owners.items() if step < limit), self.attempt)
        return any(last >= step for attempt, last in self.reached.items() if attempt < owner)

    def skipped_samples(self, *, first: int, saved_at: float) -> dict[int, int]:
        """Samples that rollbacks stepped over, by the step before which they did.

        Args:
            first: The step at which the replay begins, from a checkpoint written at `saved_at`.
        """
        skips: dict[int, int] = {}
        for event in self.rollbacks:
            if event.step is None or event.step < first or event.time < saved_at:
                continue
            what = event.what
            skips = {step: count for step, count in skips.items() if step < event.step}
            skips[event.step] = (what.skipped_samples or 0) if isinstance(what, Rollback) else 0
        return skips


def read_history(directory: Path, step: int | None) -> History:
    """Reads the log of a run, whatever state the run is in.

    Args:
        step: None: that of the last incident.

    Raises:
        TrackingError: there is no log.
        ReplayError: the log has no such step, or no incident where none was named.
    """
    run = open_run(directory)
    event, others = _event(run, step)
    if event is not None and event.step is not None:
        step, attempt = event.step, event.attempt
    elif step is None:
        only = f" but {', '.join(others)}, which is no step's numbers" if others else ""
        raise ReplayError(
            f"no incident in {directory}{only}",
            rule="without a step the last incident is replayed",
            remedy="name a step with --step",
        )
    else:
        attempt = run.attempts[-1]
    values = {name: _by_step(run, name, attempt) for name in (Metric.TRAIN_LOSS, Metric.GRAD_NORM)}
    if event is None and step not in values[Metric.TRAIN_LOSS]:
        steps = values[Metric.TRAIN_LOSS]
        known = f"{min(steps)} to {max(steps)}" if steps else "none"
        raise ReplayError(f"the log has no step {step}", rule=f"the steps that it has are {known}")
    about = _about(run, attempt)
    what = event.what if event is not None else None
    return History(
        step=step,
        attempt=attempt,
        config=_config(about, directory),
        about=about,
        incident=what if isinstance(what, Incident) else None,
        unplayable=others,
        values=values,
        bad_elements=_bad_elements(run, step, attempt),
        rollbacks=_rollbacks(run, attempt, event),
        until=_end_of(run, step, attempt),
        owners=run.limits(attempt),
        reached=_reached(run, attempt),
    )


def _event(run: Run, step: int | None) -> tuple[Event | None, tuple[str, ...]]:
    """The incident that is asked for, of a named step an outlier batch too; and where none has a verdict on a
    step, the kinds of the others: slow ranks, and waits for data, are of the machines."""
    names = (EventName.INCIDENT,) if step is None else (EventName.INCIDENT, EventName.OUTLIER)
    found = [e for e in run.events() if e.name in names and e.step is not None and step in (None, e.step)]
    judged = [e for e in found if isinstance(e.what, Incident) and e.what.verdict is not None]
    if judged:
        return judged[-1], ()
    return None, tuple(sorted({(isinstance(e.what, Incident) and e.what.kind) or e.name for e in found}))


def _by_step(run: Run, name: str, attempt: int) -> dict[int, float]:
    series = run.scalars(name, attempt=attempt)
    return dict(zip(series.steps.tolist(), series.values.tolist(), strict=True))


def _about(run: Run, attempt: int) -> dict[str, Any]:
    about: dict[str, Any] = {}
    for record in run.written("run"):
        if record.attempt <= attempt:
            about = {**about, **record.values}
    return about


def _config(about: Mapping[str, Any], directory: Path) -> TrainConfig:
    """The attempt's configuration: the run's file tells of the newest one only.

    It names the directory that is read, wherever the run was trained: a task may have kept something there.
    """
    directory, logged = directory.resolve(), about.get("config")
    if not isinstance(logged, Mapping):
        config = TrainConfig.from_file(config_file(directory))
    else:
        with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
            yaml.safe_dump(dict(logged), file, allow_unicode=True)
            file.flush()
            config = TrainConfig.from_file(file.name)
    return dataclasses.replace(config, runs_dir=str(directory.parent), name=directory.name)


def _bad_elements(run: Run, step: int, attempt: int) -> dict[str, int]:
    for record in reversed(run.written("layers")):
        if record.step == step and record.attempt == attempt:
            counts = record.values.get("num_nonfinite", {})
            return {name: int(count) for name, count in counts.items() if count and math.isfinite(count)}
    return {}


def _rollbacks(run: Run, attempt: int, event: Event | None) -> tuple[Event, ...]:
    """Those up to the attempt; a rollback is logged at the beginning of the branch that it opens."""
    before = math.inf if event is None else event.time
    rollbacks = run.events(EventName.ROLLBACK)
    return tuple(one for one in rollbacks if one.attempt <= attempt and one.time <= before)


def _end_of(run: Run, step: int, attempt: int) -> float:
    """When a later attempt began that does not hold the step."""
    limits = run.limits()
    later = [a for a in run.attempts if a > attempt]
    if step < limits.get(attempt, math.inf) or not later:
        return math.inf
    return run.attempt_starts[later[0]]


def _reached(run: Run, attempt: int) -> dict[int, int]:
    reached = {}
    for number in (a for a in run.attempts if a <= attempt):
        steps = run.scalars(Metric.TRAIN_LOSS, attempt=number).steps
        reached[number] = int(steps.max()) if len(steps) else -1
    return reached
