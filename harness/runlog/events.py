"""What happens to a run, as values: each kind of event is a class, written to a record and read from one.

    log.write("event", Checkpoint(num_steps=100).to_values(), step=99)
    for event in digest.events(EventName.CHECKPOINT):
        if isinstance(event.what, Checkpoint): ...

A record may be anybody's: what is of another type than it should be is left out when it is read, and people
log events of their own, which are none of these.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from harness.runlog.names import EventName

__all__ = [
    "Alert",
    "Checkpoint",
    "CheckpointFailed",
    "Event",
    "Fault",
    "Finding",
    "Incident",
    "LoggedEvent",
    "Outlier",
    "Resume",
    "Rollback",
    "Stop",
    "event_text",
    "read_event",
]

_ACCEPTED: Mapping[str, type | tuple[type, ...]] = {
    "str | None": str,
    "int | None": int,
    "float | None": (int, float),
    "bool": bool,
    "tuple[str, ...]": list,
    "tuple[int, ...]": list,
    "tuple[Mapping[str, Any], ...]": list,
}
"""What a record may hold for a field, by its annotation."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoggedEvent:
    """Base of all kinds. Every field has a default, for a record may lack it."""

    NAME: ClassVar[str]

    def to_values(self) -> dict[str, Any]:
        """The values of its record: fields that are None or empty are left out."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"name": self.NAME, **{k: v for k, v in fields.items() if v is not None and v != ()}}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Incident(LoggedEvent):
    """A step that was skipped, or that a rule warned of."""

    NAME = EventName.INCIDENT
    summary: str | None = None
    """What happened, in one line."""
    kind: str | None = None
    loss: float | None = None
    grad_norm: float | None = None
    verdict: str | None = None
    reason: str | None = None
    done: str | None = None
    """What became of the step, in words."""
    rank: int | None = None
    """The culprit, where there is one; so are parameter, module and micro-batch."""
    parameter: str | None = None
    module: str | None = None
    micro_batch: int | None = None
    num_nan: int | None = None
    num_inf: int | None = None
    bad_parameters: tuple[str, ...] = ()
    culprits: tuple[Mapping[str, Any], ...] = ()
    """All ranks that went wrong: `rank`, `micro_batch` and `samples` of each."""
    sample_indices: tuple[int, ...] = ()
    """Samples to look at, by their index in the data set."""
    sample_sources: tuple[str, ...] = ()
    """Where the first of them come from, if the data set says."""
    is_outlier: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outlier(Incident):
    """A step that was flagged, and after which the run went on as before."""

    NAME = EventName.OUTLIER


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Finding(LoggedEvent):
    """What a check for silent errors has found: wrong with the loop, and not with a step of it."""

    NAME = EventName.FINDING
    summary: str | None = None
    """What is wrong and what to do, in one line."""
    check: str | None = None
    problem: str | None = None
    remedy: str | None = None
    rank: int | None = None
    parameter: str | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint(LoggedEvent):
    """One that is committed."""

    NAME = EventName.CHECKPOINT
    num_steps: int | None = None
    """Completed steps that it holds."""
    epoch: int | None = None
    size_bytes: int | None = None
    blocked_s: float | None = None
    """Seconds for which training stood still."""
    seconds: float | None = None
    """From the call to the commit."""
    nonfinite: tuple[str, ...] = ()
    """Names of tensors in it with a NaN or an Inf."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFailed(Checkpoint):
    """One that could not be saved."""

    NAME = EventName.CHECKPOINT_FAILED
    error: str | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Resume(LoggedEvent):
    """An attempt goes on from a checkpoint."""

    NAME = EventName.RESUME
    checkpoint: int | None = None
    """Completed steps that it holds."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rollback(LoggedEvent):
    """The run went back to a checkpoint; the event's step is the one that comes next."""

    NAME = EventName.ROLLBACK
    failed_step: int | None = None
    reason: str | None = None
    skipped_samples: int | None = None
    """How many samples of the global order are stepped over."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stop(LoggedEvent):
    """The run was given up."""

    NAME = EventName.STOP
    reason: str | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fault(LoggedEvent):
    """A fault that was asked for."""

    NAME = EventName.FAULT
    what: str | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Alert(LoggedEvent):
    """People were told."""

    NAME = EventName.ALERT
    rule: str | None = None
    metric: str | None = None
    message: str | None = None
    level: str | None = None
    """`info`, `warning` or `error`."""


_KINDS: dict[str, type[LoggedEvent]] = {
    kind.NAME: kind
    for kind in (
        Incident,
        Outlier,
        Finding,
        Checkpoint,
        CheckpointFailed,
        Resume,
        Rollback,
        Stop,
        Fault,
        Alert,
    )
}


def read_event(values: Mapping[str, Any]) -> LoggedEvent | None:
    """The event that a record of kind `event` tells of; None if it is none of these."""
    kind = _KINDS.get(str(values.get("name")))
    if kind is None:
        return None
    read: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        value = values.get(field.name)
        if isinstance(value, _ACCEPTED[str(field.type)]):
            read[field.name] = tuple(value) if isinstance(value, list) else value
    return kind(**read)


def event_text(details: Mapping[str, Any]) -> str:
    """What happened, in one line: the event's own summary, or its details one after another."""
    said = (f"{name} {value}" for name, value in details.items() if name != "name" and value is not None)
    return str(details.get("summary") or ", ".join(said))


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """An event on a run's timeline."""

    name: str
    step: int | None
    time: float
    attempt: int
    details: dict[str, Any]
    """All that its record holds besides, whoever wrote it."""
    abandoned: bool
    """It happened on a branch that a later attempt replaced. It did happen, so it is listed all the same."""

    @property
    def what(self) -> LoggedEvent | None:
        """The same as a value of its kind; None if it is an event of somebody's own."""
        return read_event({**self.details, "name": self.name})

    @property
    def text(self) -> str:
        """What happened, in one line."""
        return event_text(self.details)
