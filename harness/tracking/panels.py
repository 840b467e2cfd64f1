"""The report's other pictures: layers over steps, ranks against each other, time and machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from harness.runlog.reader import Run
from harness.tracking.plots import COLOURS, FAINT, INK, dress, thinned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_layers", "draw_metrics", "draw_ranks"]

MAX_ROWS = 120
MAX_COLUMNS = 600
RANK_QUANTITIES = (
    ("compute_s", "compute time (s)"),
    ("data_wait_s", "data wait (s)"),
    ("loss", "loss"),
    ("grad_norm", "gradient norm"),
)


def draw_layers(run: Run, statistic: str = "grad_norm") -> Figure | None:
    """A heat map: one row per parameter, one column per step, the colour its logarithm; black: not finite."""
    layers = run.layers(statistic)
    if not layers.names:
        return None
    values = _shrunk(layers.values.T)
    with np.errstate(divide="ignore", invalid="ignore"):
        exponents = np.log10(np.abs(values))
    shown = np.ma.masked_invalid(exponents)
    figure, axis = _figure(min(14.0, 1.6 + 0.16 * len(values)))
    extent = (float(layers.steps[0]), float(max(layers.steps[-1], layers.steps[0] + 1)), len(values), 0.0)
    image = axis.imshow(shown, aspect="auto", interpolation="nearest", cmap="viridis", extent=extent)
    axis.set_facecolor("black")
    axis.set_xlabel("step", color=FAINT)
    names = layers.names if len(layers.names) <= MAX_ROWS else []
    axis.set_yticks(np.arange(len(names)) + 0.5, [name[-48:] for name in names], fontsize=7, parse_math=False)
    axis.tick_params(colors=FAINT, length=0)
    axis.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axis, pad=0.01, fraction=0.03)
    bar.set_label(f"log10 {statistic.replace('_', ' ')}", color=INK, fontsize=9)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=FAINT, labelsize=8)
    return figure


def draw_ranks(run: Run) -> Figure | None:
    """How far the ranks lie apart: the band from the least to the greatest, and their mean."""
    records = run.visible("ranks")
    quantities = [(name, label) for name, label in RANK_QUANTITIES if any(name in r.values for r in records)]
    if not quantities:
        return None
    figure, axes = _figure_of(len(quantities))
    for axis, (name, label) in zip(axes, quantities, strict=True):
        rows = {r.step or 0: np.array(r.values[name], dtype=float) for r in records if name in r.values}
        steps = np.array(sorted(rows))
        table = np.array([[f(rows[step]) for f in (np.min, np.mean, np.max)] for step in sorted(rows)])
        axis.fill_between(steps, table[:, 0], table[:, 2], color=COLOURS[0], alpha=0.2, linewidth=0)
        axis.plot(steps, table[:, 1], color=COLOURS[0], linewidth=1.2)
        axis.set_ylabel(label)
        dress(axis)
    axes[-1].set_xlabel("step", color=FAINT)
    return figure


def draw_metrics(run: Run, groups: Sequence[tuple[str, Sequence[str]]], *, by_time: bool) -> Figure | None:
    """One panel per group with a line per metric that was logged.

    Args:
        run: The run.
        groups: A label and metric names; a name that ends in `*` stands for all that begin so.
        by_time: Over minutes since the start rather than over steps.
    """
    names = run.names()
    found = [(label, _matching(names, wanted)) for label, wanted in groups]
    found = [(label, metrics) for label, metrics in found if metrics]
    if not found:
        return None
    figure, axes = _figure_of(len(found))
    for axis, (label, metrics) in zip(axes, found, strict=True):
        for metric, colour in zip(metrics, COLOURS * math.ceil(len(metrics) / len(COLOURS)), strict=False):
            _draw_metric(axis, run, metric, colour, by_time=by_time)
        axis.set_ylabel(label)
        dress(axis)
    axes[-1].set_xlabel("minutes" if by_time else "step", color=FAINT)
    return figure


def _draw_metric(axis: Axes, run: Run, metric: str, colour: str, *, by_time: bool) -> None:
    series = run.scalars(metric)
    minutes = (series.times - (run.started or 0.0)) / 60
    positions = np.arange(len(series.steps))
    kept, values = thinned(positions, series.values)
    axis.plot(
        minutes[kept] if by_time else series.steps[kept],
        values,
        color=colour,
        linewidth=1.1,
        label=metric.split("/", 1)[-1],
    )


def _matching(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    return [
        name
        for name in names
        if any(name.startswith(w[:-1]) if w.endswith("*") else name == w for w in wanted)
    ]


def _shrunk(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """At most as many rows and columns as can be seen; of what falls together the greatest is kept."""
    for axis, longest in ((0, MAX_ROWS), (1, MAX_COLUMNS)):
        if rows.shape[axis] > longest:
            starts = np.linspace(0, rows.shape[axis], longest, endpoint=False).astype(int)
            rows = np.maximum.reduceat(rows, starts, axis=axis)  # NaN wins, as it should
    return rows


def _figure(height: float) -> tuple[Figure, Axes]:
    figure, axes = _figure_of(1, height)
    return figure, axes[0]


def _figure_of(num_panels: int, height: float | None = None) -> tuple[Figure, npt.NDArray[np.object_]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (11, height or 0.5 + 1.6 * num_panels)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(num_panels, 1, sharex=True, squeeze=False)[:, 0]
    return figure, axes
