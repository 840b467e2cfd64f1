"""Recall, false alarms and delay of the spike rules on recorded and made-up series.

    python scripts/bench_detectors.py

Clean series: stable trainings recorded by `scripts/record_series.py`, and 20,000 steps each of noise, in
eight runs, with normal, Laplace, Student-t (3 degrees of freedom), contaminated-normal and strongly
autocorrelated samples. Into clean trainings, spikes of 3 to 1,000 sigma are set, one in 40 steps, in the
gradient norm and the loss by turns: a sample becomes the local level (median of the 17 around it) plus k
sigma, where sigma is the standard deviation of the 128 samples before it about their running level (at least
2 % of the norm and 0.4 % of the highest loss: on data known by heart 10 sigma would be nothing), and the
norm is in logarithms. A spike is noted if its own step is flagged, as an outlier batch or as an incident. In
the training with bad data the delay of the first flag, up to 10 steps, is measured too.

The operating curve of the default rule is taken on two surveys of trainings on raw data: by the first its
settings were chosen, the second was recorded with other data and seeds and only judges.

Writes docs/benchmarks/detectors.json, .md and .png.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from results import write_results
from torch import Tensor

from harness.stability.detectors import RULES, make_rule
from harness.stability.rules import robust

FOLDER = Path(__file__).parents[1] / "docs" / "benchmarks"
SIGMAS = (3, 5, 7.5, 10, 30, 100, 1000)
SPACING, FIRST = 40, 300
EARLY = 150
"""From where there are 128 steps to take sigma from, while the loss may still fall steeply."""
LONGEST_DELAY = 10
LEAST_SIGMA_LOG_NORM, LEAST_SIGMA_LOSS = 0.02, 0.004
NOISE_STEPS, NOISE_RUNS = 20_000, 8
THRESHOLDS = (5.0, 6.0, 7.0, 8.0, 10.0, 12.0)
RATIOS = (3.0, 5.0, 10.0, 20.0, 30.0, 100.0, 1000.0)
CURVE_SIGMAS = (5, 10, 30, 100)
DEFAULT_THRESHOLD = 7.0
LASTING = 3
"""Steps of a lasting spike."""
LASTING_TITLE = f"30 sigma in {LASTING} steps"
EARLY_TITLE = f"10 sigma in steps {EARLY} to {FIRST}"
CLEAN = (
    "quickstart", "decoder", "decoder-unclipped", "decoder-bf16", "digits-cnn", "digits-cnn-noisy",
    "digits-mlp", "digits-mlp-noisy",
)  # fmt: skip
UNSTABLE = (
    "decoder-raw-text", "decoder-high-lr", "decoder-no-warmup", "digits-mlp-diverging", "decoder-fp16",
    "digits-cnn-high-lr",
)  # fmt: skip

Samples = NDArray[np.float64]
Steps = NDArray[np.int64]
Table = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Series:
    """One run as the rules see it."""

    log_norm: Samples
    loss: Samples
    bad_steps: Sequence[int] = ()


def recorded(name: str) -> Series:
    run = json.loads((FOLDER / "series" / f"{name}.json").read_text())
    norm, loss = (np.array(run[key], dtype=float) for key in ("grad_norm", "loss"))
    return Series(np.log(norm), loss, run["bad_steps"])


def made_up(steps: int, seed: int) -> dict[str, Series]:
    """Noise about a constant level: 10 % of the norm and 4 % of the loss, as in the recorded decoders."""
    rng = np.random.default_rng(seed)

    def autocorrelated() -> Samples:
        noise = rng.standard_normal(steps)
        for step in range(1, steps):
            noise[step] += 0.9 * noise[step - 1]
        return noise

    kinds = {
        "normal": lambda: rng.standard_normal(steps),
        "laplace": lambda: rng.laplace(size=steps) / math.sqrt(2),
        "student-t": lambda: rng.standard_t(3, steps) / math.sqrt(3),
        "contaminated": lambda: rng.standard_normal(steps) * np.where(rng.random(steps) < 0.02, 2.0, 1.0),
        "autocorrelated": autocorrelated,
    }
    return {name: Series(0.1 * draw(), 2.5 + 0.1 * draw()) for name, draw in kinds.items()}


@dataclass(frozen=True)
class Seen:
    """What a fresh rule says of each step of a series."""

    flagged: NDArray[np.bool_]
    incident: NDArray[np.bool_]
    lasting: NDArray[np.bool_]
    """An incident because it lasts."""
    norm_ratio: Samples
    """Times the usual norm, where the norm is flagged; else 0."""

    @property
    def either(self) -> NDArray[np.bool_]:
        """Noted: an outlier batch or an incident."""
        return self.flagged | self.incident

    @property
    def outlier(self) -> NDArray[np.bool_]:
        return self.flagged & ~self.incident

    def at_ratio(self, ratio: float) -> Seen:
        """The same, with another ratio from which a norm alone is an incident."""
        incident = self.lasting | (self.norm_ratio >= ratio)
        return Seen(self.flagged, incident, self.lasting, self.norm_ratio)


def replay(name: str, series: Iterable[Series], **settings: float) -> list[Seen]:
    """Replays all series at once, each with a fresh rule of its own."""
    rule = make_rule(name, **settings)
    all_series = list(series)
    num_steps = max(len(one.loss) for one in all_series)

    def padded(samples: Samples) -> Tensor:
        return torch.from_numpy(np.pad(samples, (0, num_steps - len(samples)), constant_values=np.nan))

    log_norms, losses = (
        torch.stack([padded(getattr(one, signal)) for one in all_series], dim=1)
        for signal in ("log_norm", "loss")
    )

    def judge(state: dict[str, Tensor], *step: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        rule._state = dict(state)
        seen = rule.detect(*step)
        norm_is_flagged = seen.scores[0] > settings.get("threshold", DEFAULT_THRESHOLD)
        ratio = torch.where(norm_is_flagged, step[0].exp() / seen.usual[0], 0.0)
        lasting = seen.num_in_a_row >= robust.INCIDENT_STEPS
        return (seen.flagged, seen.is_incident, lasting, ratio), rule._state

    fresh = rule._fresh_state(torch.device("cpu"))
    state = {name: value.expand(len(all_series), *value.shape) for name, value in fresh.items()}
    said: list[tuple[Tensor, ...]] = []
    for log_norm, loss in zip(log_norms, losses, strict=True):
        verdict, state = torch.vmap(judge)(state, log_norm, loss, log_norm.isfinite() & loss.isfinite())
        said.append(verdict)
    columns = [torch.stack(column, dim=1).numpy() for column in zip(*said, strict=True)]
    return [Seen(*(column[row][: len(one.loss)] for column in columns)) for row, one in enumerate(all_series)]


def level_and_sigma(samples: Samples) -> tuple[Samples, Samples]:
    """Of a clean series at each step from `FIRST` on: level around it, spread before it."""
    windows = np.lib.stride_tricks.sliding_window_view
    level = np.median(windows(np.pad(samples, 8, mode="edge"), 17), axis=1)
    sigma = windows(np.pad(samples - level, (128, 0)), 128)[:-1].std(axis=1)
    return level, sigma


def injected(series: Series, size: float, *, first: int = FIRST, lasting: int = 1) -> tuple[Series, Steps]:
    """The series with spikes of `size` sigma in `lasting` steps each, and the first steps of those."""
    steps = np.arange(first, len(series.loss) - LONGEST_DELAY, SPACING)
    log_norm, loss = series.log_norm.copy(), series.loss.copy()
    floors = LEAST_SIGMA_LOG_NORM, LEAST_SIGMA_LOSS * loss.max()
    for samples, least, chosen in zip((log_norm, loss), floors, (steps[::2], steps[1::2]), strict=True):
        level, sigma = level_and_sigma(samples)
        for later in range(lasting):
            samples[chosen + later] = level[chosen] + size * np.maximum(sigma, least)[chosen]
    return Series(log_norm, loss), steps


def bad_batches_found(rule: str) -> str:
    """Batches of random bytes in a real training: found of how many, and how late on average."""
    series = recorded("decoder-bad-data")
    (seen,) = replay(rule, [series])
    windows = [np.flatnonzero(seen.either[step : step + LONGEST_DELAY]) for step in series.bad_steps]
    delays = [int(window[0]) for window in windows if len(window)]
    late = f", {np.mean(delays):.1f} steps late" if delays else ""
    return f"{len(delays)} of {len(windows)}{late}"


def described(seen: Sequence[Seen]) -> str:
    """`2 + 5`: incidents and outlier batches; a rule without tiers has only one of the two."""
    return f"{sum(one.incident.sum() for one in seen)} + {sum(one.outlier.sum() for one in seen)}"


def rows() -> Table:
    """What is measured, and each rule's result."""
    clean = {name: recorded(name) for name in CLEAN}
    titles = {f"training {name}, {len(series.loss):,} steps": [series] for name, series in clean.items()}
    for seed in range(NOISE_RUNS):
        for name, series in made_up(NOISE_STEPS // NOISE_RUNS, seed).items():
            titles.setdefault(f"noise {name}, {NOISE_STEPS:,} steps", []).append(series)
    for name in UNSTABLE:
        titles[f"unstable {name}, {len(recorded(name).loss):,} steps"] = [recorded(name)]
    table: Table = {title: {} for title in titles}
    spiked = {size: [injected(series, size) for series in clean.values()] for size in SIGMAS}
    for rule in RULES:
        seen = iter(replay(rule, [one for series in titles.values() for one in series]))
        for title, series in titles.items():
            table[title][rule] = described([next(seen) for _ in series])
        seen = iter(replay(rule, [series for group in spiked.values() for series, _ in group]))
        for size, group in spiked.items():
            row = f"noted in their own step: {sum(len(at) for _, at in group)} spikes of {size:g} sigma"
            found = sum(int(next(seen).either[at].sum()) for _, at in group)
            table.setdefault(row, {})[rule] = found
        table.setdefault("noted: batches of random bytes", {})[rule] = bad_batches_found(rule)
    return table


# --- the default rule on the surveys


def survey(folder: str) -> dict[str, Series]:
    """The recorded trainings of a survey by name."""
    return {
        path.stem: recorded(f"{folder}/{path.stem}")
        for path in sorted((FOLDER / "series" / folder).glob("*"))
    }


def is_disturbed(series: Series) -> bool:
    """Whether something was wrong after all: for five steps the loss was a fifth above the untrained one."""
    five = np.median(np.lib.stride_tricks.sliding_window_view(series.loss, 5), axis=1)
    return bool((five[50:] > 1.2 * series.loss[0]).any())


def survey_rows(surveys: dict[str, dict[str, Series]]) -> Table:
    """Per survey and kind of data: steps, incidents, outlier batches; what was disturbed stands apart."""
    table: Table = {}
    for folder, runs in surveys.items():
        for (name, series), seen in zip(runs.items(), replay("robust", runs.values()), strict=True):
            kind = f"disturbed: {name}" if is_disturbed(series) else name.split("-")[0]
            row = table.setdefault(f"{folder}, {kind}", {"steps": 0, "incidents": 0, "outlier batches": 0})
            row["steps"] += len(series.loss)
            row["incidents"] += int(seen.incident.sum())
            row["outlier batches"] += int(seen.outlier.sum())
    return table


def curves(chosen: Sequence[Series], judged: Sequence[Series]) -> tuple[Table, Table]:
    """False alarms on both surveys and the share of spikes found in the second: per threshold of the score,
    and per ratio from which a norm alone is an incident."""
    spiked = {f"{size:g} sigma": [injected(one, size) for one in judged] for size in CURVE_SIGMAS}
    spiked[LASTING_TITLE] = [injected(one, 30, lasting=LASTING) for one in judged]
    spiked[EARLY_TITLE] = [injected(one, 10, first=EARLY) for one in judged]
    steps = {title: [at for _, at in group] for title, group in spiked.items()}
    steps[EARLY_TITLE] = [at[at < FIRST] for at in steps[EARLY_TITLE]]
    everything = [*chosen, *judged, *(series for group in spiked.values() for series, _ in group)]

    def row(seen: Sequence[Seen]) -> dict[str, float]:
        rest = iter(seen)
        alarms = [(folder, [next(rest) for _ in all_series]) for folder, all_series in surveys]
        found = [(title, [next(rest) for _ in where]) for title, where in steps.items()]
        parts = [_false_alarms(*one) for one in alarms] + [_found(*one, steps[one[0]]) for one in found]
        return {name: value for part in parts for name, value in part.items()}

    surveys = (("chosen", chosen), ("held-out", judged))
    by_threshold: Table = {}
    for threshold in THRESHOLDS:
        seen = replay("robust", everything, threshold=threshold)
        by_threshold[f"{threshold:g}"] = row(seen)
        if threshold == DEFAULT_THRESHOLD:
            by_ratio: Table = {f"{ratio:g}": row([one.at_ratio(ratio) for one in seen]) for ratio in RATIOS}
        print(f"threshold {threshold:g}", flush=True)
    return by_threshold, by_ratio


def _false_alarms(folder: str, seen: Sequence[Seen]) -> dict[str, float]:
    num_steps = sum(len(one.flagged) for one in seen)
    counts = {tier: sum(int(getattr(one, tier).sum()) for one in seen) for tier in ("incident", "outlier")}
    return {f"{tier}s in 1,000, {folder}": round(1000 * num / num_steps, 3) for tier, num in counts.items()}


def _found(title: str, seen: Sequence[Seen], steps: Sequence[Steps]) -> dict[str, float]:
    """Share noted in their own step, and of those that are an incident by their last."""
    num, last = sum(map(len, steps)), LASTING - 1 if title == LASTING_TITLE else 0
    noted = sum(int(one.either[at].sum()) for one, at in zip(seen, steps, strict=True))
    raised = sum(int(one.incident[at + last].sum()) for one, at in zip(seen, steps, strict=True))
    return {f"noted, {title}": round(noted / num, 4), f"incidents, {title}": round(raised / num, 4)}


def draw(thresholds: Table, path: Path) -> None:
    """The operating curve over the threshold."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3))
    x = [float(value) for value in thresholds]
    for tier in ("outliers", "incidents"):
        left.plot(x, [row[f"{tier} in 1,000, held-out"] for row in thresholds.values()], "o-", label=tier)
    left.set_ylabel("in 1,000 clean steps")
    for size in CURVE_SIGMAS[:3]:
        right.plot(
            x, [row[f"noted, {size:g} sigma"] for row in thresholds.values()], "o-", label=f"{size} sigma"
        )
    right.set_ylabel("share noted in their own step")
    for panel in (left, right):
        panel.axvline(DEFAULT_THRESHOLD, color="0.7", linestyle="--", zorder=0)
        panel.set_xlabel("guard.spike_threshold")
        panel.legend(frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    torch.set_num_threads(1)
    surveys = {folder: survey(folder) for folder in ("chosen", "held-out")}
    chosen, judged = (
        [series for series in runs.values() if not is_disturbed(series)] for runs in surveys.values()
    )
    thresholds, ratios = curves(chosen, judged)
    draw(thresholds, FOLDER / "detectors.png")
    sections = {
        "The default rule on trainings on raw data": survey_rows(surveys),
        "Its operating curve: guard.spike_threshold": thresholds,
        "Its operating curve: times the usual norm that are an incident": ratios,
    }
    about = {
        "spikes": f"one in {SPACING} steps",
        "noise_steps": NOISE_STEPS,
        "cells": "incidents + outlier batches",
    }
    write_results("detectors", rows(), device=torch.device("cpu"), about=about, sections=sections)


if __name__ == "__main__":
    main()
