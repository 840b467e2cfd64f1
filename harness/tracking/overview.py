"""A run in a few numbers, and a folder of runs as a table."""

from __future__ import annotations

import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from harness.errors import TrackingError
from harness.tracking.reader import Run, is_run, open_run
from harness.tracking.text import age, number, table

__all__ = ["find_runs", "runs_table", "show_run", "summarise"]

LOSSES = ("train/loss", "val/loss")


def summarise(run: Run) -> dict[str, Any]:
    """State, steps, last and best losses, speed, skips, and the number of events by kind."""
    last_step = run.last_step
    summary: dict[str, Any] = {
        "name": run.path.resolve().name,
        "run_dir": str(run.path),
        "state": run.state(),
        "attempts": len(run.attempts),
        "num_steps": 0 if last_step is None else last_step + 1,
        "started": run.started,
        "updated": run.updated,
        "duration_s": (run.updated or 0.0) - (run.started or 0.0),
        "events": dict(Counter(event.name for event in run.events())),
        "num_nonfinite_steps": _num_nonfinite_steps(run),
        "last": {name: run.last(name) for name in run.names() if not name.startswith(("layers/", "ranks/"))},
    }
    for name in LOSSES:
        values = run.scalars(name).values
        finite = values[np.isfinite(values)]
        summary[f"best_{name}"] = float(finite.min()) if len(finite) else None
    return summary


def find_runs(runs_dir: str | Path) -> list[Path]:
    """The run directories in a folder and below, newest first; runs are not looked into."""
    root = Path(runs_dir)
    if not root.is_dir():
        raise TrackingError(f"there is no folder {root}", remedy="name the folder that holds the runs")
    found, folders = [], [root]
    while folders:
        folder = folders.pop()
        if is_run(folder):
            found.append(folder)
        else:
            folders += [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
    return sorted(found, key=lambda path: -(open_run(path).updated or 0.0))


def runs_table(runs_dir: str | Path) -> str:
    """One line per run: state, step, losses, tokens/s, skips, age. For `harness runs`."""
    heads = ["run", "state", "step", "loss", "held out", "tokens/s", "skips", "incidents", "age"]
    rows = [_row(open_run(path)) for path in find_runs(runs_dir)]
    return table(heads, rows) if rows else f"no runs in {runs_dir}"


def show_run(run_dir: str | Path) -> str:
    """The run in words and numbers. For `harness show`."""
    run = open_run(run_dir)
    summary = summarise(run)
    parts = [_heading(run, summary), _metrics(run), _events(run), _hparams(run)]
    return "\n\n".join(part for part in parts if part)


def _row(run: Run) -> list[str]:
    step = run.last_step
    incidents = len(run.events("incident"))
    return [
        run.path.resolve().name,
        run.state(),
        "-" if step is None else str(step),
        *(number(run.last(name)) for name in (*LOSSES, "speed/tokens_per_s", "guard/skips")),
        str(incidents),
        age(time.time() - (run.updated or time.time())),
    ]


def _heading(run: Run, summary: dict[str, Any]) -> str:
    host = f" on {run.info['host']}" if "host" in run.info else ""
    lines = [
        f"{summary['name']}: {summary['state']}, {summary['num_steps']} steps in {age(summary['duration_s'])}"
        f", {summary['attempts']} attempt{'s' if summary['attempts'] != 1 else ''}{host}",
        f"directory  {run.path}",
    ]
    command = " ".join(map(str, run.info.get("command", [])))
    if command:
        lines.append(f"command    {command}")
    if run.num_damaged:
        lines.append(f"damaged    {run.num_damaged} lines of the log cannot be read and are left out")
    return "\n".join(lines)


def _metrics(run: Run) -> str:
    rows = []
    for name in run.names():
        values = run.scalars(name).values
        finite = values[np.isfinite(values)]
        if not len(values):
            continue
        low, high = (finite.min(), finite.max()) if len(finite) else (math.nan, math.nan)
        odd = len(values) - len(finite)
        rows.append([name, number(values[-1]), number(low), number(high), str(len(values)), str(odd or "")])
    return table(["metric", "last", "smallest", "largest", "points", "non-finite"], rows) if rows else ""


def _events(run: Run, longest: int = 20) -> str:
    events = [event for event in run.events() if event.name != "checkpoint"]
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
    loss = run.scalars("train/loss")
    steps = set(loss.steps[~np.isfinite(loss.values)].tolist())
    for name in ("guard/num_nan", "guard/num_inf"):
        counts = run.scalars(name)
        steps |= set(counts.steps[counts.values > 0].tolist())
    return len(steps)
