"""What the page is told: a run, its curves and its layers as plain data. Nothing here keeps state.

Curves are bands: each point is the smallest, the mean and the largest value of the steps that it stands for,
and says how many of them were not finite, so that nothing that happened is hidden by the width of a screen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import orjson

from harness.dashboard.checkpoints import checkpoints
from harness.runlog.digest import Bands, Digest
from harness.runlog.events import Checkpoint, Event
from harness.runlog.ledger import Ledger
from harness.runlog.names import EventName, Metric, Prefix, main_first
from harness.tracking.compare import settings_of
from harness.tracking.text import printable, spelled

__all__ = [
    "Axis",
    "curves_view",
    "embedded_curves",
    "embedded_layers",
    "events_view",
    "layers_view",
    "run_view",
    "settings_view",
]

Axis = Literal["step", "tokens", "hours", "clock"]
AXES: tuple[Axis, ...] = get_args(Axis)
MAX_EVENTS = 500
MAX_NAMES = 5000
"""Names of metrics sent at once; beyond them the page asks for what it searches."""
MAX_DETAILS = 40
MAX_TEXT = 500

Floats = npt.NDArray[np.float64]
Steps = npt.NDArray[np.int64]


def run_view(digest: Digest) -> dict[str, Any]:
    """State, settings, metrics and events of a run: all of the page but its curves."""
    names = digest.names()
    shown = main_first(names)
    config = digest.info.get("config") or {}
    return {
        "state": digest.state(),
        "last_step": digest.last_step,
        "total_steps": _nested(config, "loop", "steps"),
        "max_norm": _nested(config, "guard", "max_norm"),
        "started": digest.started,
        "updated": digest.updated,
        "attempts": len(digest.attempts),
        "read_frac": digest.read_frac,
        "is_preview": digest.is_preview,
        "num_damaged": digest.num_damaged,
        "host": _cut(digest.info.get("host")),
        "command": [_words(part) for part in digest.info.get("command", [])[:MAX_DETAILS]],
        "end": _brief(digest.end) if digest.end is not None else None,
        "last": {name: spelled(digest.last(name)) for name in shown[:MAX_NAMES]},
        "names": [name for name in shown if not name.startswith(Prefix.RANKS)][:MAX_NAMES],
        "num_names": len(names),
        "statistics": sorted({name.split("/")[1] for name in names if name.startswith(Prefix.LAYERS)}),
        "ranks": spelled(digest.ranks()),
        "ledger": _ledger(digest.ledger),
        "best_val_loss": _smallest(digest.bands(Metric.VAL_LOSS)),
        "nonfinite_steps": _nonfinite_steps(digest),
        "checkpoints": _checkpoints(digest),
        **events_view(digest.events()),
    }


def events_view(events: Sequence[Event]) -> dict[str, Any]:
    """The newest events, the incidents among them, and how many there are of each kind.

    Checkpoints are counted but not listed: they are many, and have a table of their own.
    """
    kinds: dict[str, int] = {}
    for event in events:
        kinds[event.name] = kinds.get(event.name, 0) + 1
    return {
        "event_counts": kinds,
        "events": [
            {
                "name": e.name,
                "step": e.step,
                "time": e.time,
                "abandoned": e.abandoned,
                "text": e.text[:MAX_TEXT],
            }
            for e in [e for e in events if e.name != EventName.CHECKPOINT][-MAX_EVENTS:]
        ],
        "incidents": [
            {
                "time": e.time,
                "attempt": e.attempt,
                "abandoned": e.abandoned,
                "step": e.step,
                **_brief(e.details),
            }
            for e in events
            if e.name == EventName.INCIDENT
        ][-MAX_EVENTS:],
    }


def curves_view(
    digest: Digest,
    names: Iterable[str],
    *,
    axis: Axis = "step",
    within: tuple[int, int] | None = None,
    max_points: int = 800,
) -> dict[str, Any]:
    """Metrics as bands, those with the same steps on one common x.

    Args:
        digest: The run.
        names: Metrics; unknown ones come back empty.
        axis: What x counts: steps, tokens, hours since the start, or seconds since the epoch.
        within: First and last step to show; None for all.
        max_points: Points per curve at most.
    """
    view = embedded_curves(digest, names, axes=(axis,), within=within, max_points=max_points)
    xs = [{"x": place[axis], "steps": place["steps"]} for place in view["xs"]]
    return {"xs": xs, "curves": view["curves"], "axis": axis}


def embedded_curves(
    digest: Digest,
    names: Iterable[str],
    *,
    axes: Sequence[Axis] = AXES,
    within: tuple[int, int] | None = None,
    max_points: int = 800,
) -> dict[str, Any]:
    """The same with every x on several axes, for a page that has no server to ask for another."""
    rulers = {axis: _Ruler(digest, axis) for axis in axes}
    is_timed = not {"hours", "clock"}.isdisjoint(axes)
    xs: list[dict[str, Any]] = []
    known: dict[bytes, int] = {}
    curves = {}
    for name in names:
        bands = digest.bands(name, within=within, max_points=max_points)
        key = bands.steps.tobytes() + (bands.times.tobytes() if is_timed else b"")
        if key not in known:
            known[key] = len(xs)
            xs.append({axis: ruler.measure(bands.steps, bands.times) for axis, ruler in rulers.items()})
            xs[-1]["steps"] = bands.steps
        curves[name] = {"x": known[key], **_curve(bands)}
    return {"xs": xs, "curves": curves}


def layers_view(
    digest: Digest, statistic: str, *, within: tuple[int, int] | None = None, max_columns: int = 300
) -> dict[str, Any]:
    """A statistic of every parameter over steps, the largest of each column; for the heat map."""
    layers = digest.layers(statistic, within=within, max_columns=max_columns)
    return {
        "statistic": statistic,
        "steps": layers.steps,
        "names": layers.names,
        "values": [_compact(np.ascontiguousarray(row)) for row in layers.values.T],
        "nonfinite": [np.flatnonzero(np.isinf(row)) for row in layers.values.T],
    }


def embedded_layers(
    digest: Digest, statistic: str, *, axes: Sequence[Axis] = AXES, max_columns: int
) -> dict[str, Any]:
    """The heat map with its x on several axes, as in `embedded_curves`."""
    view = layers_view(digest, statistic, max_columns=max_columns)
    steps = view["steps"]
    name = next(iter(view["names"]), "")  # none where somebody's own metric has such a name
    clock = digest.bands(f"{Prefix.LAYERS}{statistic}/{name}", max_points=max_columns)
    times = np.interp(steps, clock.steps, clock.times) if len(steps) else np.empty(0)
    view["x"] = {axis: _Ruler(digest, axis).measure(steps, times) for axis in axes}
    view["x"]["steps"] = steps
    return view


def settings_view(digest: Digest) -> list[tuple[str, str]]:
    """The run's settings under dotted names, as words."""
    settings = list(settings_of(digest).items())[:MAX_NAMES]
    return [(printable(name, MAX_TEXT), printable(str(value), MAX_TEXT)) for name, value in settings]


class _Ruler:
    """Turns steps and times into what the x axis counts."""

    def __init__(self, digest: Digest, axis: Axis) -> None:
        self._axis = axis
        self._started = digest.started or 0.0
        self._tokens = digest.bands(Metric.TOKENS) if axis == "tokens" else None

    def measure(self, steps: npt.NDArray[np.int64], times: Floats) -> npt.NDArray[Any]:
        if self._axis == "hours":
            return np.round((times - self._started) / 3600, 6)
        if self._axis == "clock":
            return np.round(times, 2)
        if self._tokens is not None and len(self._tokens.steps):
            return np.interp(steps, self._tokens.steps, self._tokens.high)
        return steps


def _ledger(ledger: Ledger | None) -> dict[str, Any] | None:
    """Seconds and share of each class of a run's wall time."""
    if ledger is None:
        return None
    return {
        "wall_s": ledger.wall_s,
        "goodput_frac": ledger.goodput_frac,
        "ettr_frac": ledger.ettr_frac,
        "classes": [{"name": kind, "seconds": spent, "frac": share} for kind, spent, share in ledger.rows()],
    }


def _smallest(bands: Bands) -> float | None:
    return float(np.nanmin(bands.low)) if np.isfinite(bands.low).any() else None


def _nonfinite_steps(digest: Digest) -> dict[str, Any]:
    """In how many steps the loss or a gradient element was not finite; in a long run, at least.

    Points that stand for several steps need not begin at the same ones in all three metrics: where they
    overlap, they may speak of the same steps, and only one of them is counted.
    """
    num, is_exact, has_elements = 0, True, False
    counted: list[tuple[Steps, Steps]] = []  # first steps, and those after the last
    for name in (Metric.TRAIN_LOSS, Metric.NUM_NAN, Metric.NUM_INF):
        bands, is_loss = digest.bands(name), name == Metric.TRAIN_LOSS
        counts = bands.num_nan + bands.num_inf if is_loss else (bands.high > 0).astype(np.int64)
        struck = counts > 0
        firsts, ends = bands.steps[struck], _ends(bands)[struck]
        overlaps = np.zeros(len(firsts), dtype=np.bool_)
        for begins, afters in counted:
            overlaps |= ((firsts[:, None] < afters) & (begins < ends[:, None])).any(axis=1)
        num += int(counts[struck][~overlaps].sum())
        counted.append((firsts[~overlaps], ends[~overlaps]))
        has_elements = has_elements or (not is_loss and bool(struck.any()))
        is_exact = is_exact and bool((bands.num_points[struck] == 1).all())
    return {"num": num, "is_exact": is_exact or not has_elements}


def _ends(bands: Bands) -> Steps:
    """The step after the last one that each point stands for, at most."""
    following = np.append(bands.steps[1:], np.iinfo(np.int64).max)
    ends: Steps = np.where(bands.num_points == 1, bands.steps + 1, following)
    return ends


def _curve(bands: Bands) -> dict[str, Any]:
    reduced = bool((bands.num_points > 1).any())
    places = np.flatnonzero(bands.num_nan + bands.num_inf)
    return {
        "mean": _compact(bands.mean),
        "low": _compact(bands.low) if reduced else None,
        "high": _compact(bands.high) if reduced else None,
        "nonfinite": np.stack([places, bands.num_nan[places], bands.num_inf[places]], axis=1),
    }


def _compact(values: Floats) -> npt.NDArray[Any]:
    """Seven digits are enough for a picture, unless they lose a number's size."""
    with np.errstate(over="ignore"):
        short = values.astype(np.float32)
    return values if np.isinf(short).any() else short


def _checkpoints(digest: Digest) -> list[dict[str, Any]]:
    """What the log says was saved, and what is there of it now."""
    there = checkpoints(digest.path, within=digest.within)[-MAX_EVENTS:]
    saved = [
        {**_brief(e.details), "num_steps": e.what.num_steps, "time": e.time, "health": "deleted"}
        for e in digest.events(EventName.CHECKPOINT)
        if isinstance(e.what, Checkpoint) and e.what.num_steps is not None
    ]
    by_steps = {checkpoint["num_steps"]: checkpoint for checkpoint in saved}
    for one in there:
        known = by_steps.setdefault(one.step, {"num_steps": one.step, "time": None})
        known["health"] = "healthy" if one.healthy else "pending"
    return [by_steps[num_steps] for num_steps in sorted(by_steps)][-MAX_EVENTS:]


def _brief(details: dict[str, Any]) -> dict[str, Any]:
    """An event's details, cut to what a table can show."""
    shown = list(details.items())[:MAX_DETAILS]
    return {
        name[:MAX_TEXT]: _cut(value) for name, value in shown if name not in ("time", "attempt", "abandoned")
    }


def _cut(value: Any) -> Any:
    """A value as it is while it is short; of a list the first ones; else its beginning in words."""
    if isinstance(value, list):
        few = value if len(value) <= 9 else [*value[:8], f"and {len(value) - 8} more"]
        return [spelled(one) if _is_plain(one) else _words(one) for one in few]
    return spelled(value) if _is_plain(value) else _words(value)


def _is_plain(value: Any) -> bool:
    return (
        value is None
        or isinstance(value, (bool, int, float))
        or (isinstance(value, str) and len(value) <= MAX_TEXT)
    )


def _words(value: Any) -> str:
    text = (
        value
        if isinstance(value, str)
        else orjson.dumps(spelled(value), option=orjson.OPT_NON_STR_KEYS).decode()
    )
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 1]}…"


def _nested(config: Any, *path: str) -> Any:
    for key in path:
        config = config.get(key) if isinstance(config, dict) else None
    return config
