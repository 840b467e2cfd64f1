"""A run as it goes, in the terminal: `harness watch`."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import threading
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import numpy as np

from harness.runlog.events import Event
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
NUM_EVENTS, MAX_EVENT = 5, 500
LABEL_WIDTH, VALUE_WIDTH = 13, 10
"""Together with a space between them the width of the narrowest terminal that shows both whole."""
MIN_CURVE_WIDTH = 5
LOOK_AT_SIZE_EVERY_S = 0.1
UNLIMITED = 1 << 30
NORMAL_SIZE = (80, 24)
ENDINGS = (signal.SIGTERM, signal.SIGHUP)
OWN_SCREEN, FORMER_SCREEN, CLEAR = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l", "\x1b[H\x1b[J"


def watch_run(
    run_dir: str | Path, *, every_s: float = 2.0, stream: TextIO | None = None, once: bool = False
) -> None:
    """Draws the run again and again until it ends, over the whole terminal, and anew when that is resized.

    The last frame stays on the terminal afterwards. What is no terminal gets one frame after another.

    Raises:
        TrackingError: there is no such run.
    """
    stream = stream or sys.stdout
    run = open_run(run_dir)
    draw = _draw_over if stream.isatty() else _draw_below
    try:
        with _own_screen(stream) if stream.isatty() and not once else contextlib.nullcontext():
            while not once and run.state() == "running":
                draw(run, stream)
                _wait(stream, every_s)
                run.refresh()
    finally:
        _draw_below(run, stream)


def frame(run: Run, width: int = 100, height: int = UNLIMITED) -> str:
    """What `watch_run` draws, in at most so many columns and lines.

    First name, state and step; then a line for each usual metric, the loss first, and the newest events.
    """
    head = _head(run, width)
    names = set(run.names())
    metrics = [_metric(run, name, label, width) for name, label in WATCHED if name in names]
    events = [_event(event) for event in run.events() if event.name != EventName.CHECKPOINT][-NUM_EVENTS:]
    room = height - len(head)
    num_events = min(len(events), max(room - len(metrics), room // 3))
    shown = [*head, *metrics[: max(0, room - num_events)], *events[len(events) - num_events :]]
    return "\n".join(_cut(line, width) for line in shown[:height])


def _head(run: Run, width: int) -> list[str]:
    """One line, or two where that is too narrow."""
    name = printable(run.path.resolve().name)
    step = run.last_step
    state = f"{run.state()}  {'no step yet' if step is None else f'step {step}'}"
    quiet = age(time.time() - (run.updated or time.time()))
    line = f"{name}  {state}  (last record {quiet} ago)"
    return [line] if _num_columns(line) <= width else [name, state]


def _metric(run: Run, name: str, label: str, width: int) -> str:
    """Label, last value and curve; where room is short, the value stays whole."""
    value = number(run.last(name)).rjust(VALUE_WIDTH)
    label_width = max(0, min(LABEL_WIDTH, width - 1 - len(value)))
    line = f"{label[:label_width]:<{label_width}} {value}"
    curve_width = width - len(line) - 2
    if curve_width < MIN_CURVE_WIDTH:
        return line
    bands = run.bands(name)
    means = np.where(bands.num_nan + bands.num_inf, np.nan, bands.mean)
    return f"{line}  {sparkline(means, curve_width)}"


def _event(event: Event) -> str:
    at = "" if event.step is None else f" at step {event.step}"
    return printable(f"! {event.name}{at}  {event.text}", longest=MAX_EVENT)


def _cut(line: str, width: int) -> str:
    """The beginning of a line that fits into so many columns."""
    if _num_columns(line) <= width:
        return line
    while line and _num_columns(line) > width - 1:
        line = line[:-1]
    return f"{line}…"


def _num_columns(text: str) -> int:
    """That a terminal needs for it."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def _size(stream: TextIO) -> tuple[int, int]:
    """Columns and lines."""
    if stream.isatty():
        columns, lines = os.get_terminal_size(stream.fileno())
    else:
        columns, lines = shutil.get_terminal_size().columns, UNLIMITED
    return columns or NORMAL_SIZE[0], lines or NORMAL_SIZE[1]


@contextlib.contextmanager
def _own_screen(stream: TextIO) -> Iterator[None]:
    """A screen of its own, as editors have; what was on the terminal comes back afterwards."""
    with _ending_in_order():
        try:
            stream.write(OWN_SCREEN)
            yield
        finally:
            stream.write(FORMER_SCREEN)
            stream.flush()


@contextlib.contextmanager
def _ending_in_order() -> Iterator[None]:
    """Signals that would end the program at once end it by an exception; one that is ignored stays so."""
    former = {}
    if threading.current_thread() is threading.main_thread():  # no other one may set handlers
        former = {number: signal.getsignal(number) for number in ENDINGS}
    former = {number: handler for number, handler in former.items() if handler is signal.SIG_DFL}
    try:
        for number in former:
            signal.signal(number, _end)
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _end(number: int, _: object) -> None:
    raise SystemExit(128 + number)  # as shells call it


def _draw_over(run: Run, stream: TextIO) -> None:
    stream.write(CLEAR + frame(run, *_size(stream)))  # no line break at the end, which would scroll
    stream.flush()


def _draw_below(run: Run, stream: TextIO) -> None:
    stream.write(frame(run, _size(stream)[0]) + "\n")
    stream.flush()


def _wait(stream: TextIO, seconds: float) -> None:
    """Less long when the terminal has been resized."""
    size, due = _size(stream), time.monotonic() + max(seconds, LOOK_AT_SIZE_EVERY_S)
    while (left_s := due - time.monotonic()) > 0 and _size(stream) == size:
        time.sleep(min(left_s, LOOK_AT_SIZE_EVERY_S))
