"""A run in a few numbers, and a folder of runs as a table."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np

from harness.errors import TrackingError
from harness.files import list_folder
from harness.runlog.digest import MAX_NAMES, Digest
from harness.runlog.ledger import Ledger
from harness.runlog.names import EventName, Metric
from harness.runlog.preview import open_digest
from harness.runlog.reader import Run, State, is_run, open_run
from harness.tracking.incidents import incidents_table
from harness.tracking.text import age, damage, number, printable, table

__all__ = [
    "RunRow",
    "no_summary",
    "run_name",
    "run_paths",
    "run_row",
    "run_rows",
    "runs_table",
    "show_run",
    "summarise",
    "unreadable_row",
]

logger = logging.getLogger(__name__)

MAX_TAGS = 50
_LOOKS_SPELLED = re.compile(r"\\x[89a-f][0-9a-f]")
LOSSES = (Metric.TRAIN_LOSS, Metric.VAL_LOSS)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunRow:
    """A run in a few numbers: a row of a table."""

    path: Path
    state: State | Literal["unreadable"]
    attempts: int
    last_step: int | None
    total_steps: int | None
    """What its configuration asks for."""
    loss: float | None
    val_loss: float | None
    tokens_per_s: float | None
    skips: float | None
    num_incidents: int
    group: str | None
    tags: tuple[str, ...]
    host: str | None
    started: float | None
    """Seconds since the epoch; `updated` too."""
    updated: float | None
    num_damaged: int
    read_frac: float
    """How much of the log these numbers stand for."""


def run_row(digest: Digest) -> RunRow:
    """The run's row."""
    tracking = _section(digest.info.get("config"), "tracking")
    total_steps = _section(digest.info.get("config"), "loop").get("steps")
    group, tags, host = tracking.get("group"), tracking.get("tags"), digest.info.get("host")
    return RunRow(
        path=digest.path,
        state=digest.state(),
        attempts=len(digest.attempts),
        last_step=digest.last_step,
        total_steps=total_steps if type(total_steps) is int and 0 <= total_steps < 2**63 else None,
        loss=digest.last(Metric.TRAIN_LOSS),
        val_loss=digest.last(Metric.VAL_LOSS),
        tokens_per_s=digest.last(Metric.TOKENS_PER_S),
        skips=digest.last(Metric.SKIPS),
        num_incidents=digest.num_incidents,
        group=_word(group) if group is not None else None,
        tags=tuple(_word(tag) for tag in tags[:MAX_TAGS]) if isinstance(tags, list) else (),
        host=_word(host) if host is not None else None,
        started=digest.started,
        updated=digest.updated,
        num_damaged=digest.num_damaged,
        read_frac=digest.read_frac,
    )


def unreadable_row(path: Path) -> RunRow:
    """The row of a run of which nothing can be told."""
    unknown = dict.fromkeys(field.name for field in dataclasses.fields(RunRow))
    known = {"path": path, "state": "unreadable", "attempts": 0, "num_incidents": 0, "tags": ()}
    return RunRow(**{**unknown, **known, "num_damaged": 0, "read_frac": 1.0})  # type: ignore[arg-type]


def _word(text: object) -> str:
    return printable(str(text))


def _section(config: Any, name: str) -> dict[str, Any]:
    section = config.get(name) if isinstance(config, dict) else None
    return section if isinstance(section, dict) else {}


def summarise(run: Run) -> dict[str, Any]:
    """State, steps, last and best losses, speed, skips, the number of events by kind, and where the time
    went."""
    last_step = run.last_step
    summary: dict[str, Any] = {
        "name": run.path.resolve().name,
        "run_dir": str(run.path),
        "state": run.state(),
        "attempts": len(run.attempts),
        "num_steps": 0 if last_step is None else last_step + 1,
        "started": run.started,
        "updated": run.updated,
        "duration_s": 0.0 if run.updated is None or run.started is None else run.updated - run.started,
        "events": dict(Counter(event.name for event in run.events())),
        "num_nonfinite_steps": _num_nonfinite_steps(run),
        "ledger": _seconds(run.ledger),
        "last": {name: run.last(name) for name in run.names()},
    }
    for name in LOSSES:
        lowest = run.bands(name, max_points=1).low
        summary[f"best_{name}"] = float(lowest[0]) if np.isfinite(lowest).any() else None
    return summary


def _seconds(ledger: Ledger | None) -> dict[str, float]:
    return {} if ledger is None else {str(kind): spent for kind, spent in ledger.seconds.items()}


def no_summary(run_dir: Path) -> dict[str, Any]:
    """What `summarise` says of a run without records; reads nothing."""
    return {
        "name": run_dir.name,
        "run_dir": str(run_dir),
        "state": "stale",
        "attempts": 0,
        "num_steps": 0,
        "started": None,
        "updated": None,
        "duration_s": 0.0,
        "events": {},
        "num_nonfinite_steps": 0,
        "ledger": {},
        "last": {},
        **{f"best_{name}": None for name in LOSSES},
    }


def run_paths(runs_dir: str | Path, *, within: Path | None = None) -> list[Path]:
    """The run directories in a folder and below, in no order; no link to a folder is followed.

    Args:
        runs_dir: The folder.
        within: The same folder where a log that is a link makes no run; see `harness.files.open_file`.
    """
    root = Path(runs_dir)
    found, folders = [], [root]
    while folders:
        folder = folders.pop()
        try:
            if is_run(folder, within=within):
                found.append(folder)
            else:
                folders += [folder / name for name in list_folder(folder, within=root).folders]
        except OSError:  # not ours to read, or gone meanwhile
            continue
    return found


def run_name(path: Path, root: Path) -> str:
    """A run's path below a folder of runs, by which it is known; bytes that are no UTF-8 are spelled `\\xff`.

    No two runs have one name: where a path itself looks like that, its backslashes are doubled.
    """
    name = os.fsencode(path.relative_to(root))
    if _LOOKS_SPELLED.search(name.decode(errors="backslashreplace")):
        name = name.replace(b"\\", b"\\\\")
    return name.decode(errors="backslashreplace")


def run_rows(runs_dir: str | Path) -> list[RunRow]:
    """Every run in a folder and below, the one that logged last first."""
    root = Path(runs_dir)
    if not root.is_dir():
        raise TrackingError(f"there is no folder {root}", remedy="name the folder that holds the runs")
    found = []
    for path in run_paths(root):
        try:
            found.append(run_row(open_digest(path)))
        except FileNotFoundError:  # removed meanwhile
            continue
        except Exception as error:  # noqa: BLE001  (one odd run never hides the others)
            logger.warning("%s cannot be read: %s", printable(str(path)), printable(repr(error)))
            found.append(unreadable_row(path))
    return sorted(found, key=lambda one: -(one.updated or 0.0))


def runs_table(runs_dir: str | Path) -> str:
    """One line per run: state, step, losses, tokens/s, skips, age. For `harness runs`."""
    heads = ["run", "state", "step", "loss", "held out", "tokens/s", "skips", "incidents", "age"]
    rows = [_row(one) for one in run_rows(runs_dir)]
    return table(heads, rows) if rows else f"no runs in {runs_dir}"


def show_run(run_dir: str | Path) -> str:
    """The run in words and numbers. For `harness show`."""
    run = open_run(run_dir)
    summary = summarise(run)
    parts = [_heading(run, summary), _ledger(run), _metrics(run), _events(run), incidents_table(run.path)]
    parts.append(_hparams(run))
    return "\n\n".join(part for part in parts if part)


def _row(one: RunRow) -> list[str]:
    """Of a long log only a preview has been read, so there may be more incidents than were seen."""
    incidents = str(one.num_incidents) if one.read_frac >= 1 else f"{one.num_incidents or ''}?"
    return [
        one.path.resolve().name,
        one.state,
        "-" if one.last_step is None else str(one.last_step),
        *(number(value) for value in (one.loss, one.val_loss, one.tokens_per_s, one.skips)),
        incidents,
        age(time.time() - (one.updated or time.time())),
    ]


def _heading(run: Run, summary: dict[str, Any]) -> str:
    host = f" on {printable(run.info['host'])}" if "host" in run.info else ""
    lines = [
        f"{printable(summary['name'])}: {summary['state']}, {summary['num_steps']} steps"
        f" in {age(summary['duration_s'])}"
        f", {summary['attempts']} attempt{'s' if summary['attempts'] != 1 else ''}{host}",
        f"directory  {printable(str(run.path), longest=1000)}",
    ]
    command = " ".join(map(str, run.info.get("command", [])))
    if command:
        lines.append(f"command    {printable(command, longest=1000)}")
    if run.num_damaged:
        lines.append(f"damaged    {damage(run.num_damaged)}")
    if run.num_left_out:
        lines.append(f"left out   {run.num_left_out} values: the run has more than {MAX_NAMES} metrics")
    return "\n".join(lines)


def _ledger(run: Run) -> str:
    ledger = run.ledger
    if ledger is None:
        return ""
    rows = [[kind, f"{spent:.1f}", f"{100 * share:.1f}"] for kind, spent, share in ledger.rows()]
    rows.append(["wall time", f"{ledger.wall_s:.1f}", "100.0"])
    shares = (
        f"goodput {100 * ledger.goodput_frac:.1f} %, effective training time {100 * ledger.ettr_frac:.1f} %"
    )
    return f"{table(['where the time went', 'seconds', '%'], rows)}\n{shares}"


def _metrics(run: Run) -> str:
    rows = []
    for name in run.names():
        for _, _, low, _, high, count, num_nan, num_inf in zip(*run.bands(name, max_points=1), strict=True):
            odd = num_nan + num_inf
            rows.append([name, number(run.last(name)), number(low), number(high), str(count), str(odd or "")])
    return table(["metric", "last", "smallest", "largest", "points", "non-finite"], rows) if rows else ""


def _events(run: Run, longest: int = 20) -> str:
    events = [event for event in run.events() if event.name != EventName.CHECKPOINT]
    rows = [
        [
            event.name,
            "-" if event.step is None else str(event.step),
            "abandoned" if event.abandoned else "",
            event.text[:100],
        ]
        for event in events[-longest:]
    ]
    more = f"\n({len(events) - longest} earlier ones are left out)" if len(events) > longest else ""
    return table(["event", "step", "branch", "details"], rows) + more if rows else ""


def _hparams(run: Run) -> str:
    rows = [[name, str(value)[:100]] for name, value in sorted(run.hparams.items())]
    return table(["hyperparameter", "value"], rows) if rows else ""


def _num_nonfinite_steps(run: Run) -> int:
    """Steps at which the loss or a gradient element was not finite."""
    odd: set[int] = set()
    for name in (Metric.TRAIN_LOSS, Metric.NUM_NAN, Metric.NUM_INF):
        bands = run.bands(name, max_points=1)
        has_any = bands.num_nan + bands.num_inf if name == Metric.TRAIN_LOSS else bands.high > 0
        if has_any.any():  # else there is nothing that the log would have to be read for
            steps, values, _ = run.scalars(name)
            odd.update(steps[values > 0 if name != Metric.TRAIN_LOSS else ~np.isfinite(values)].tolist())
    return len(odd)
