"""What is kept of an incident, `incidents/step-N/`: the names of its files, and what they hold, as types.

```
incident.json                  what happened, by rank 0 (in a crash by the first rank that gets to it)
rank-R.json                    the last steps of rank R: samples, losses, timings, digests of RNG states
rng-rank-R.json                those RNG states, by generator and digest
stacks-rank-R.txt              the traceback of a crash of rank R
batch-rank-R.safetensors       the micro-batches of a culprit, with `incidents.save_batch`
memory-rank-R.pickle           out of memory: torch's allocator snapshot, for https://pytorch.org/memory_viz
memory-rank-R.json             out of memory: bytes of parameters, gradients, optimizer state, the process
trace-rank-R.json.gz           a torch profiler trace
replay.json  story.md          what `harness replay` has found
```

Whatever stands here can be anybody's: what is damaged, or of other types, is a `TrackingError`. NaN and
infinities are kept as in the run's log (`codec`). Nothing is ever unpickled.
"""

from __future__ import annotations

import base64
import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import orjson

from harness.atomic import write_atomically
from harness.errors import TrackingError
from harness.files import list_folder, read_file
from harness.records import Culprit, ParameterRow, RankRow
from harness.runlog.codec import to_plain, with_nonfinite
from harness.runlog.paths import STORY, incident_step, incidents_dir, is_hang

__all__ = [
    "BATCH",
    "INCIDENT",
    "MEMORY",
    "REPLAY",
    "SNAPSHOT",
    "STACKS",
    "STORY",
    "TRACE",
    "IncidentFile",
    "RankFile",
    "RememberedStep",
    "RngStates",
    "hang_folders",
    "incident_steps",
    "rank_path",
    "ranks_in",
    "read_incident",
    "read_rank",
    "read_rng",
    "write_json",
    "write_rank",
    "write_rng",
]

INCIDENT, REPLAY = "incident.json", "replay.json"
RANK, RNG = "rank-{}.json", "rng-rank-{}.json"
STACKS, BATCH = "stacks-rank-{}.txt", "batch-rank-{}.safetensors"
MEMORY, SNAPSHOT, TRACE = "memory-rank-{}.json", "memory-rank-{}.pickle", "trace-rank-{}.json.gz"

LONGEST_BYTES = 256 << 20
_VERSION = 1
_RANK_FILE = re.compile(r"rank-([0-9]{1,9})\.json")

RngStates = dict[str, Any]
"""The state of each generator by name, as JSON holds it: `python` as `random.getstate()` gives it, with lists
for tuples; `numpy` as `numpy.random.get_state()` does; `torch` and `cuda` as the bytes of torch's state."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RememberedStep:
    """A step as one rank remembers it."""

    step: int
    position: int
    """Global position of the step's first sample in the order of the data."""
    samples: tuple[tuple[int, ...], ...] = ()
    """Indices in the data set of this rank's samples, by micro-batch."""
    rng: Mapping[str, str] = field(default_factory=dict)
    """Digest of each generator's state at the beginning of the step, before its batch was fetched."""
    step_s: float | None = None
    """Wall time; this and what follows is None until the step has ended, or its record has arrived."""
    verdict: str | None = None
    loss: float | None = None
    """Of this rank alone, as are the others."""
    grad_norm: float | None = None
    num_nan: int | None = None
    num_inf: int | None = None
    compute_s: float | None = None
    data_wait_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFile:
    """`rank-R.json`."""

    rank: int
    world_size: int
    step: int
    """Of the incident."""
    host: str
    pid: int
    steps: tuple[RememberedStep, ...]
    """The last ones up to and beyond `step`, in the order in which they were made."""
    error: str | None = None
    """What this rank raised, in a crash or out of memory."""
    phase: str | None = None
    """What it was doing, in a crash or a hang."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Files that were not written, and why."""
    rerun: tuple[str, ...] = ()
    """With `incidents.rerun`: what running a micro-batch of the step again on the spot says, then a line for
    each variation."""

    def at(self, step: int) -> RememberedStep | None:
        """What the rank remembers of a step, the newest where a rollback made it twice."""
        return next((one for one in reversed(self.steps) if one.step == step), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class IncidentFile:
    """`incident.json`."""

    step: int
    kind: str
    """`non-finite loss`, `non-finite gradient`, `fp16 overflow`, `spike`, `absurd gradient`, `replicas
    differ`, `check`, `hang`, `out of memory`, `crash`."""
    reason: str
    summary: str
    """The incident in a line."""
    time: float
    """Seconds since the epoch."""
    verdict: str | None = None
    """None: the step did not come to one."""
    rank: int | None = None
    """The culprit, where there is one; so are parameter and micro-batch."""
    parameter: str | None = None
    micro_batch: int | None = None
    culprits: tuple[Culprit, ...] = ()
    """All ranks that went wrong, each with its micro-batch and that one's samples."""
    loss: float | None = None
    grad_norm: float | None = None
    num_nan: int | None = None
    num_inf: int | None = None
    per_rank: tuple[RankRow, ...] = ()
    per_parameter: Mapping[str, ParameterRow] = field(default_factory=dict)
    """Over all ranks, as in the step's record."""
    culprit_parameters: Mapping[str, ParameterRow] = field(default_factory=dict)
    """The culprit's own gradient, before the reduction."""
    world_size: int = 1
    num_micro_batches: int = 1
    """Of each rank in a step, at most: some may have one less."""
    micro_batch_samples: int = 1
    """Samples of a micro-batch."""
    position: int = 0
    """Global position of the step's first sample in the order of the data; see `sample_order`."""
    num_samples: int = 0
    """Of the training data."""
    seed: int = 0
    """Of the order."""
    quarantined: tuple[int, ...] = ()
    """Samples that were left out, by their index."""
    samples: tuple[tuple[tuple[int, ...], ...], ...] = ()
    """Indices in the data set of the step's samples, by rank and micro-batch."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Where samples come from, by index: of the culprits' where there are any, if the data set says."""
    checkpoint: str | None = None
    """Name of the newest committed checkpoint at or before the step."""
    config_fingerprint: str = ""
    """xxh3_64 of the resolved configuration."""
    versions: Mapping[str, str] = field(default_factory=dict)
    git_revision: str | None = None
    stacks: str | None = None
    """Of a hang: the folder beside this one with the stacks of all ranks."""
    other_hosts: Mapping[str, str] = field(default_factory=dict)
    """Host of each rank whose files lie there, on another file system, in a folder of the same path."""


def rank_path(folder: Path, name: str, rank: int) -> Path:
    """The file of a rank in an incident's folder; `name` is one of the constants above."""
    return folder / name.format(rank)


def incident_steps(run_dir: str | Path, *, within: Path | None = None) -> list[int]:
    """The steps of which a folder is kept, in order; whatever is in it."""
    names = list_folder(incidents_dir(run_dir), within=within).folders
    return sorted(step for name in names if (step := incident_step(name)) is not None)


def hang_folders(run_dir: str | Path) -> list[Path]:
    """The folders with the stacks of a run that hung, the oldest first."""
    folder = incidents_dir(run_dir)
    return [folder / name for name in list_folder(folder).folders if is_hang(name)]


def ranks_in(folder: Path) -> list[int]:
    """The ranks whose files lie in an incident's folder."""
    return sorted(
        int(match[1]) for name in list_folder(folder).files if (match := _RANK_FILE.fullmatch(name))
    )


def read_incident(folder: Path) -> IncidentFile:
    """What happened.

    Raises:
        TrackingError: there is no such file, or it is damaged.
    """
    return _read(folder / INCIDENT, IncidentFile)


def read_rank(folder: Path, rank: int) -> RankFile:
    """What a rank remembers.

    Raises:
        TrackingError: there is no such file, or it is damaged.
    """
    return _read(rank_path(folder, RANK, rank), RankFile)


def read_rng(folder: Path, rank: int, step: int) -> RngStates:
    """The states of a rank's generators at the beginning of a step; `harness.training.rng_states` makes of
    them what `harness.checkpoint.Rng` loads. Empty if the rank does not remember the step.

    Raises:
        TrackingError: a file is not there, or is damaged.
    """
    remembered = read_rank(folder, rank).at(step)
    if remembered is None:
        return {}
    path = rank_path(folder, RNG, rank)
    states = _load(path)
    try:
        found = {name: states[name][digest] for name, digest in remembered.rng.items()}
        return {name: base64.b64decode(s) if isinstance(s, str) else s for name, s in found.items()}
    except (LookupError, TypeError, ValueError) as error:
        raise _damaged(path, error) from error


def write_json(path: Path, what: Any) -> None:
    """Writes a dataclass, or a mapping; one call of the disk.

    Raises:
        OSError: the disk is full, gone or read-only.
    """
    values, nonfinite = to_plain(dataclasses.asdict(what) if dataclasses.is_dataclass(what) else what)  # type: ignore[arg-type]
    content = {"version": _VERSION, **values, "nonfinite": nonfinite}
    write_atomically(path, orjson.dumps(content, option=orjson.OPT_INDENT_2))


def write_rank(folder: Path, what: RankFile) -> None:
    """Writes `rank-R.json`."""
    write_json(rank_path(folder, RANK, what.rank), what)


def write_rng(folder: Path, rank: int, states: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes `rng-rank-R.json`: states by generator and digest, as in `RngStates`."""
    encoded = {
        name: {d: base64.b64encode(s).decode() if isinstance(s, bytes) else s for d, s in by_digest.items()}
        for name, by_digest in states.items()
    }
    content = orjson.dumps({"version": _VERSION, **encoded})
    write_atomically(rank_path(folder, RNG, rank), content)


def _load(path: Path) -> dict[str, Any]:
    try:
        values = orjson.loads(read_file(path, most_bytes=LONGEST_BYTES))
    except OSError as error:
        raise TrackingError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise _damaged(path, error) from error
    if not isinstance(values, dict):
        raise _damaged(path, "it is no object")
    if values.get("version") != _VERSION:
        raise TrackingError(
            f"{path} is of version {values.get('version')!r}",
            rule=f"this release reads version {_VERSION}",
            remedy="read it with the release that wrote it",
        )
    return values


def _read(path: Path, kind: type[T]) -> T:
    values = _load(path)
    try:
        value: T = _typed(kind, with_nonfinite(values, values.get("nonfinite", ())))
        return value
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: object) -> TrackingError:
    return TrackingError(f"{path} is damaged: {error}", remedy="look at the other files of its folder")


def _typed(kind: Any, value: Any) -> Any:
    """`value`, as JSON holds it, as a value of the annotation `kind`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{name: _typed(hint, value[name]) for name, hint in hints.items() if name in value})  # type: ignore[operator]
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _typed(arguments[0], value)
    if origin is tuple:
        return tuple(_typed(arguments[0], one) for one in _checked(list, value))
    if origin is not None and issubclass(origin, Mapping):
        return {name: _typed(arguments[1], one) for name, one in _checked(dict, value).items()}
    if kind is float and type(value) is int:
        return float(value)
    return _checked(kind, value)


def _checked(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{str(value)[:40]!r} is no {kind.__name__}")
    return value
