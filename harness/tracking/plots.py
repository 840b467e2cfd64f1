"""The picture of a run: one page that shows whether it was healthy, in bounded memory however long the run.

    plot_run("runs/quickstart", "runs/quickstart/curves.png")

Drawn on a `Figure` with its own canvas: no display, no global state of pyplot, safe in any thread.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from harness.atomic import output_file, replacing
from harness.runlog.digest import Bands, Digest
from harness.runlog.names import EventName, Metric
from harness.runlog.preview import open_whole
from harness.tracking.text import number, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_run", "plot_run"]

INK = "#1f2430"
FAINT = "#8a91a0"
GRID = "#e6e8ee"
BLUE, ORANGE, GREEN, RED, VIOLET = "#3566d6", "#e07b29", "#2c9a68", "#cf3a3a", "#7b52c4"
EVENT_COLOURS = {
    EventName.INCIDENT: RED,
    EventName.FAULT: ORANGE,
    EventName.ROLLBACK: VIOLET,
    EventName.RESUME: GREEN,
    EventName.STOP: INK,
    EventName.ALERT: ORANGE,
    EventName.OUTLIER: FAINT,
    EventName.FINDING: ORANGE,
}
"""Events that are marked in the picture; checkpoints are too many to be."""
MAX_POINTS = 2000
"""More points than pixels are reduced to bands, extremes kept."""
MAX_DRAWN = 1e150
"""Larger numbers are drawn as this one: differences, margins and ticks of an axis have to be finite too."""
RAW_POINTS = 400
"""A curve of more points is drawn faintly, with its running median over it."""


def plot_run(run_dir: str | Path, path: str | Path) -> Path:
    """Draws the run into an image file, of the kind that its suffix says (.png, .svg, .pdf).

    Raises:
        TrackingError: there is no run in `run_dir`.
        OSError: the file cannot be written.
    """
    figure = draw_run(open_whole(run_dir))
    with replacing(output_file(path)) as unfinished:
        figure.savefig(unfinished, dpi=150)
    return Path(path)


def draw_run(run: Digest) -> Figure:
    """Loss, gradient norm and non-finite gradients over the steps, with the events; accuracy and learning
    rate where they were logged."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = [panel for panel in _PANELS if panel.always or len(_bands(run, panel.metric).steps)]
    heights = [panel.height for panel in panels]
    figure = Figure(figsize=(11, 0.9 + 1.04 * sum(heights)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, sharex=True, height_ratios=heights)
    for axis, panel in zip(axes, panels, strict=True):
        axis.set_ylabel(panel.label)
        panel.draw(axis, run)
    marked = _mark_events(axes, run)
    for axis in axes:
        _dress(axis)
    axes[-1].set_xlabel("step", color=FAINT)
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.align_ylabels(axes)
    _title(figure, run, marked)
    return figure


def _draw_loss(axis: Axes, run: Digest) -> None:
    curves = [_curve(axis, run, Metric.TRAIN_LOSS, "training", BLUE), _held_out(axis, run, Metric.VAL_LOSS)]
    _limit_to_bulk(axis, curves)


def _draw_grad_norm(axis: Axes, run: Digest) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    before = _curve(axis, run, Metric.GRAD_NORM, "before clipping", VIOLET)
    after = _curve(axis, run, Metric.GRAD_NORM_CLIPPED, "after clipping", GREEN)
    shown = np.concatenate([before.low, before.high, after.low, after.high])
    positive = shown[shown > 0]
    if len(positive):
        is_narrow = positive.max() < 1000 * positive.min()
        axis.set_yscale("log", nonpositive="mask")  # the norm over no finite element is 0
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if is_narrow else (1,)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())


def _draw_lr(axis: Axes, run: Digest) -> None:
    lr = _bands(run, Metric.LR)
    axis.plot(lr.steps, lr.mean, color=BLUE, linewidth=1.6)
    axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)


def _draw_nonfinite(axis: Axes, run: Digest) -> None:
    worst = 0.0
    for name, label, colour, marker in (
        (Metric.NUM_NAN, "NaN", RED, "o"),
        (Metric.NUM_INF, "Inf", ORANGE, "D"),
    ):
        counts = _bands(run, name)
        struck = counts.high > 0
        steps, most = counts.steps[struck], counts.high[struck]
        axis.vlines(steps, 0, most, color=colour, linewidth=1.2)
        axis.plot(steps, most, marker, color=colour, label=label, markersize=4)
        worst = max(worst, float(np.max(most, initial=0.0)))
    if worst:
        axis.set_yscale("symlog", linthresh=1)
        axis.set_ylim(0, 10 * worst)
    else:
        axis.set_ylim(0, 1)
        axis.set_yticks([0])
        axis.text(0.5, 0.5, "none", color=FAINT, ha="center", va="center", transform=axis.transAxes)


def _draw_accuracy(axis: Axes, run: Digest) -> None:
    _curve(axis, run, Metric.TRAIN_ACCURACY, "training", BLUE)
    _held_out(axis, run, Metric.VAL_ACCURACY)


@dataclasses.dataclass(frozen=True)
class _Panel:
    label: str
    metric: str
    draw: Callable[[Axes, Digest], None]
    height: float
    always: bool = True


_PANELS = (
    _Panel("loss", Metric.TRAIN_LOSS, _draw_loss, 3.0),
    _Panel("accuracy", Metric.TRAIN_ACCURACY, _draw_accuracy, 1.8, always=False),
    _Panel("gradient norm", Metric.GRAD_NORM, _draw_grad_norm, 2.2),
    _Panel("learning rate", Metric.LR, _draw_lr, 1.2, always=False),
    _Panel("non-finite", Metric.NUM_NAN, _draw_nonfinite, 1.2),
)


def _bands(run: Digest, name: str) -> Bands:
    """The metric in numbers that matplotlib can put on an axis."""
    bands = run.bands(name, max_points=MAX_POINTS)
    low, mean, high = (np.clip(values, -MAX_DRAWN, MAX_DRAWN) for values in bands[2:5])
    return bands._replace(low=low, mean=mean, high=high)


def _curve(axis: Axes, run: Digest, name: str, label: str, colour: str) -> Bands:
    """The metric as a band with its mean, and with a running median where it is long; returns the band."""
    bands = _bands(run, name)
    is_long = len(bands.steps) > RAW_POINTS
    axis.fill_between(bands.steps, bands.low, bands.high, color=colour, alpha=0.2, linewidth=0)
    axis.plot(
        bands.steps,
        bands.mean,
        color=colour,
        alpha=0.3 if is_long else 1.0,
        linewidth=0.8 if is_long else 1.4,
        label=None if is_long else label,
    )
    if is_long:
        median = _running_median(bands.mean, len(bands.mean) // 60)
        axis.plot(bands.steps, median, color=colour, linewidth=1.6, label=label)
    return bands


def _held_out(axis: Axes, run: Digest, name: str) -> Bands:
    bands = _bands(run, name)
    if len(bands.steps):
        axis.plot(
            bands.steps, bands.mean, "o-", color=ORANGE, label="held out", markersize=3.5, linewidth=1.6
        )
    return bands


def _running_median(values: npt.NDArray[np.float64], half_width: int) -> npt.NDArray[np.float64]:
    padded = np.pad(values, half_width, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half_width + 1)
    ordered = np.sort(windows, axis=1)  # NaN last
    counts = np.sum(~np.isnan(windows), axis=1)
    middle = ordered[np.arange(len(values)), np.maximum(counts - 1, 0) // 2]
    return np.where(counts > 0, middle, np.nan)


def _limit_to_bulk(axis: Axes, curves: Sequence[Bands]) -> None:
    """Keeps one monstrous value from flattening everything else; it leaves the picture at the top."""
    means, lows, highs = (
        np.concatenate([getattr(bands, which) for bands in curves]) for which in ("mean", "low", "high")
    )
    if not np.isfinite(means).any():
        return
    low, usual = np.nanmin(lows), np.nanquantile(means, 0.99)
    height = (usual - low) or 0.1 * abs(low) or 1.0  # a curve that is flat but for one value has none
    if np.nanmax(highs) > usual + 3 * height:
        axis.set_ylim(low - 0.05 * height, usual + 0.5 * height)


def _mark_events(axes: npt.NDArray[np.object_], run: Digest) -> list[str]:
    """Lines at the events' steps, one where several fall together; returns the kinds that are shown."""
    events = [e for e in run.events() if e.step is not None and e.name in EVENT_COLOURS]
    name_at: dict[int | None, str] = {}
    for name in EVENT_COLOURS:
        for event in events:
            if event.name == name:
                name_at.setdefault(event.step, name)
    for axis in axes:
        for step, name in name_at.items():
            axis.axvline(step, color=EVENT_COLOURS[name], linewidth=1.0, linestyle=(0, (4, 2)), zorder=1)
    return [name for name in EVENT_COLOURS if name in name_at.values()]


def _dress(axis: Axes) -> None:
    """The look that all panels share."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(FAINT)
    axis.grid(True, color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=FAINT, labelsize=9)
    axis.yaxis.label.set_color(INK)
    axis.margins(x=0.01)
    if axis.get_legend_handles_labels()[1]:
        axis.legend(frameon=False, fontsize=9, loc="best", ncols=3, labelcolor=INK)


def _title(figure: Figure, run: Digest, marked: list[str]) -> None:
    from matplotlib.lines import Line2D

    figure.suptitle(_headline(run), color=INK, fontsize=12, x=0.012, ha="left", parse_math=False)
    if marked:
        counts = {name: sum(event.name == name for event in run.events()) for name in marked}
        handles = [
            Line2D(
                [], [], color=EVENT_COLOURS[name], linestyle=(0, (4, 2)), label=_plural(name, counts[name])
            )
            for name in marked
        ]
        figure.legend(handles=handles, loc="upper right", frameon=False, fontsize=9, ncols=6, labelcolor=INK)


def _headline(run: Digest) -> str:
    parts = [printable(run.path.resolve().name, 40), run.state()]
    if run.last_step is not None:
        parts.append(f"{run.last_step + 1} steps")
    for metric, label in ((Metric.TRAIN_LOSS, "loss"), (Metric.VAL_LOSS, "held out")):
        value = run.last(metric)
        if value is not None:
            parts.append(f"{label} {value:.4f}" if abs(value) < 1e6 else f"{label} {number(value)}")
    return "   ".join(parts)


def _plural(name: str, count: int) -> str:
    return f"{count} {name}" + ("s" if count != 1 else "")
