"""Two runs side by side: what was set differently, what came out differently, and where they parted."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
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

__all__ = ["Comparison", "Parting", "compare_runs", "compare_text"]

logger = logging.getLogger(__name__)

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
    settings: dict[str, tuple[Any, Any]]
    """Settings and hyperparameters that differ, by dotted name; None where one has none."""
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
    ours, theirs = settings_of(first), settings_of(second)
    metrics = sorted(set(first.names()) | set(second.names()))
    return Comparison(
        names=(_name(first), _name(second)),
        num_damaged=(first.num_damaged, second.num_damaged),
        settings={
            name: (ours.get(name), theirs.get(name))
            for name in sorted(set(ours) | set(theirs))
            if ours.get(name) != theirs.get(name)
        },
        metrics={name: (first.last(name), second.last(name)) for name in metrics},
        partings=sorted(_partings(first, second), key=lambda p: np.inf if p.step is None else p.step),
    )


def compare_text(a: str | Path, b: str | Path) -> str:
    """The comparison in words and tables. For `harness compare`."""
    comparison = compare_runs(a, b)
    heads = list(comparison.names)
    damaged = zip(comparison.names, comparison.num_damaged, strict=True)
    settings = [[name, str(x), str(y)] for name, (x, y) in comparison.settings.items()]
    metrics = [[name, number(x), number(y), _difference(x, y)] for name, (x, y) in comparison.metrics.items()]
    parts = [
        table(["setting", *heads], settings) if settings else "the settings are the same",
        table(["last value", *heads, "difference"], metrics) if metrics else "no metrics",
        _partings_text(comparison),
        *(f"{printable(name)}: {damage(count)}" for name, count in damaged if count),
    ]
    return "\n\n".join(parts)


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


def _partings_text(comparison: Comparison) -> str:
    partings = comparison.partings
    if not partings:
        return "they have no step in common"
    parted = [parting for parting in partings if parting.step is not None]
    if not parted:
        return f"equal, bit for bit, on all {comparison.num_common} steps that both have"
    rows = [
        [parting.metric, str(parting.step), *(repr(value) for value in parting.values or ())]
        for parting in parted
    ]
    return f"they part at step {parted[0].step}\n" + table(["metric", "first step", "first", "second"], rows)


def _difference(x: float | None, y: float | None) -> str:
    if x is None or y is None:
        return "-"
    relative = f" ({(y - x) / abs(x):+.2%})" if x and np.isfinite(x) and np.isfinite(y) else ""
    return f"{y - x:+.5g}{relative}"


def _name(run: Run) -> str:
    return run.path.resolve().name
