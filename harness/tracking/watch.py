"""A run as it goes, in the terminal: `harness watch`."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import TextIO

import numpy as np

from harness.runlog.names import EventName, Metric, Prefix
from harness.runlog.reader import Run, open_run
from harness.tracking.text import age, number, printable, sparkline

__all__ = ["frame", "watch_run"]

WATCHED = (
    (Metric.TRAIN_LOSS, "loss"),
    (Metric.VAL_LOSS, "held out"),
    (Metric.TRAIN_ACCURACY, "accuracy"),
    (Metric.GRAD_NORM, "gradient norm"),
    (Metric.LR, "learning rate"),
    (Metric.TOKENS_PER_S, "tokens/s"),
    (Metric.STEP_S, "step time"),
    (Metric.SKIPS, "skips"),
    (Metric.CPU_FRAC, "cpu"),
    (f"{Prefix.SYSTEM}gpu0/util_frac", "gpu 0"),
)
NUM_EVENTS = 5


def watch_run(
    run_dir: str | Path, *, every_s: float = 2.0, stream: TextIO | None = None, once: bool = False
) -> None:
    """Draws the run again and again until it ends, in place on a terminal, else one frame after another.

    Raises:
        TrackingError: there is no such run.
    """
    stream = stream or sys.stdout
    run = open_run(run_dir)
    num_lines = 0
    while True:
        text = frame(run, shutil.get_terminal_size().columns)
        if num_lines and stream.isatty():
            stream.write(f"\x1b[{num_lines}A\x1b[J")  # back to the first line, clear what follows
        stream.write(text + "\n")
        stream.flush()
        num_lines = text.count("\n") + 1
        if once or run.state() != "running":
            return
        time.sleep(every_s)
        run.refresh()


def frame(run: Run, width: int = 100) -> str:
    """What `watch_run` draws: state, a line for each usual metric, the newest events."""
    step = run.last_step
    quiet = age(time.time() - (run.updated or time.time()))
    steps = "no step yet" if step is None else f"step {step}"
    lines = [f"{printable(run.path.resolve().name)}  {run.state()}  {steps}  (last word {quiet} ago)"]
    names = set(run.names())
    lines += [_metric(run, name, label, width) for name, label in WATCHED if name in names]
    for event in [e for e in run.events() if e.name != EventName.CHECKPOINT][-NUM_EVENTS:]:
        at = "" if event.step is None else f" at step {event.step}"
        lines.append(printable(f"! {event.name}{at}  {event.text}", longest=max(20, width)))
    return "\n".join(lines)


def _metric(run: Run, name: str, label: str, width: int) -> str:
    bands = run.bands(name)
    means = np.where(bands.num_nan + bands.num_inf, np.nan, bands.mean)
    drawn = sparkline(means, max(10, width - 30))
    return f"{label:<14} {number(run.last(name)):>10}  {drawn}"
