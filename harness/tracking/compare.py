"""Runs side by side: what was set differently, what came out differently, and where they parted."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from harness.config.plain_yaml import plain_yaml_file
from harness.errors import ConfigError
from harness.runlog.digest import Digest
from harness.runlog.names import Prefix
from harness.runlog.paths import config_file
from harness.runlog.reader import Run, open_run
from harness.runlog.series import Series
from harness.tracking.text import damage, number, printable, table

__all__ = ["Comparison", "Parting", "compare_runs", "compare_text", "different_settings", "settings_of"]

logger = logging.getLogger(__name__)

NOT_SET = "not set"
"""In place of a setting that a run does not know, which is another thing than one that is null."""
_OF_THE_MACHINE = (Prefix.TIME, Prefix.SPEED, Prefix.SYSTEM)
"""What these say of the same training is another number every time."""


@dataclasses.dataclass(frozen=True, slots=True)
class Parting:
    """The first step at which a metric is not the same number, bit for bit."""

    metric: str
    step: int | None
    """None: equal on all steps that both have."""
    num_common: int
    values: tuple[float, float] | None


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """How run `b` differs from run `a`."""

    names: tuple[str, str]
    settings: dict[str, list[Any]]
    """Settings and hyperparameters that differ, by dotted name, as `different_settings` gives them."""
    metrics: dict[str, tuple[float | None, float | None]]
    """Last values of every metric that either has."""
    num_damaged: tuple[int, int]
    """Lines of each log that are no records."""
    partings: list[Parting]
    """For each metric of the steps that both have, the earliest first."""

    @property
    def num_common(self) -> int:
        """How many steps both have: of the metric that has the most."""
        return max((parting.num_common for parting in self.partings), default=0)


def compare_runs(a: str | Path, b: str | Path, *, within: Path | None = None) -> Comparison:
    """Compares two runs' timelines.

    Args:
        a: A run's directory.
        b: Another one's.
        within: See `harness.files.open_file`.

    Raises:
        TrackingError: one of them is no run.
    """
    first, second = open_run(a, within=within), open_run(b, within=within)
    metrics = sorted(set(first.names()) | set(second.names()))
    return Comparison(
        names=(_name(first), _name(second)),
        num_damaged=(first.num_damaged, second.num_damaged),
        settings=different_settings([settings_of(first), settings_of(second)]),
        metrics={name: (first.last(name), second.last(name)) for name in metrics},
        partings=sorted(_partings(first, second), key=lambda p: np.inf if p.step is None else p.step),
    )


def compare_text(*paths: str | Path) -> str:
    """The comparison of two runs or more with the first in words and tables. For `harness compare`.

    Raises:
        TrackingError: one of them is no run.
    """
    comparisons = [compare_runs(paths[0], path) for path in paths[1:]]
    heads = [comparisons[0].names[0], *(comparison.names[1] for comparison in comparisons)]
    damaged = [comparisons[0].num_damaged[0], *(comparison.num_damaged[1] for comparison in comparisons)]
    settings = different_settings([settings_of(open_run(path)) for path in paths])
    parts = [
        table(["setting", *heads], [[name, *map(str, values)] for name, values in settings.items()])
        if settings
        else "the settings are the same",
        _metrics_text(heads, comparisons),
        *(_partings_text(comparison, among=len(paths)) for comparison in comparisons),
        *(f"{printable(name)}: {damage(count)}" for name, count in zip(heads, damaged, strict=True) if count),
    ]
    return "\n\n".join(parts)


def different_settings(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """A value of each run for each setting that is not the same in all: None is said as `null`, and `not set`
    where a run does not know it."""
    names = sorted({name for settings in runs for name in settings})
    rows = {name: [_setting(settings, name) for settings in runs] for name in names}
    return {name: values for name, values in rows.items() if any(value != values[0] for value in values)}


def _setting(settings: Mapping[str, Any], name: str) -> Any:
    if name not in settings:
        return NOT_SET
    return "null" if settings[name] is None else settings[name]


def _metrics_text(heads: list[str], comparisons: Sequence[Comparison]) -> str:
    names = sorted({name for comparison in comparisons for name in comparison.metrics})
    rows = []
    for name in names:
        pairs = [comparison.metrics.get(name, (None, None)) for comparison in comparisons]
        first = next((x for x, _ in pairs if x is not None), None)
        difference = [_difference(*pairs[0])] if len(pairs) == 1 else []
        rows.append([name, number(first), *(number(y) for _, y in pairs), *difference])
    more = ["difference"] if len(comparisons) == 1 else []
    return table(["last value", *heads, *more], rows) if rows else "no metrics"


def settings_of(run: Run | Digest) -> dict[str, Any]:
    """The run's configuration and hyperparameters under dotted names.

    Where its file `config.yaml` is missing or is no configuration, the log's copy is taken.
    """
    try:
        config = plain_yaml_file(config_file(run.path), within=run.within)
    except (OSError, ConfigError) as error:
        if not isinstance(error, FileNotFoundError):
            logger.info("%s", error)
        config = None
    if not isinstance(config, dict):
        config = run.info.get("config") or {}
    return dict(sorted({**_flat(config, ""), **_flat(run.hparams, "")}.items()))


def _flat(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _partings(first: Run, second: Run) -> list[Parting]:
    """One for each metric that has steps in common; the logs are read once more, a stretch at a time."""
    found: dict[str, Parting] = {}
    for stretch in first.stretches():
        ours, theirs = first.between(*stretch), second.between(*stretch)
        for name in sorted(ours.keys() & theirs.keys()):
            if not name.startswith(_OF_THE_MACHINE):
                here, before = _parting(name, ours[name], theirs[name]), found.get(name)
                earliest = here if before is None or before.step is None else before
                num_common = here.num_common + (before.num_common if before else 0)
                found[name] = dataclasses.replace(earliest, num_common=num_common)
    return [parting for parting in found.values() if parting.num_common]


def _parting(metric: str, ours: Series, theirs: Series) -> Parting:
    steps, at_ours, at_theirs = np.intersect1d(ours.steps, theirs.steps, True, return_indices=True)
    x, y = ours.values[at_ours], theirs.values[at_theirs]
    different = np.flatnonzero(~((x == y) | (np.isnan(x) & np.isnan(y))))
    if not len(different):
        return Parting(metric, None, len(steps), None)
    at = different[0]
    return Parting(metric, int(steps[at]), len(steps), (float(x[at]), float(y[at])))


def _partings_text(comparison: Comparison, *, among: int) -> str:
    partings = comparison.partings
    who = "" if among == 2 else f"{' and '.join(map(printable, comparison.names))}: "
    if not partings:
        return f"{who}they have no step in common"
    parted = [parting for parting in partings if parting.step is not None]
    if not parted:
        return f"{who}equal, bit for bit, on all {comparison.num_common} steps that both have"
    rows = [
        [parting.metric, str(parting.step), *(repr(value) for value in parting.values or ())]
        for parting in parted
    ]
    heads = ["metric", "first step", "first", "second"]
    return f"{who}they part at step {parted[0].step}\n" + table(heads, rows)


def _difference(x: float | None, y: float | None) -> str:
    if x is None or y is None:
        return "-"
    relative = f" ({(y - x) / abs(x):+.2%})" if x and np.isfinite(x) and np.isfinite(y) else ""
    return f"{y - x:+.5g}{relative}"


def _name(run: Run) -> str:
    return run.path.resolve().name
