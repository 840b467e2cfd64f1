"""Recall, false alarms and delay of the spike rules on recorded and made-up series.

    python scripts/bench_detectors.py

Clean series: stable trainings recorded by `scripts/record_series.py`, and 20,000 steps each of noise with
normal, Laplace, contaminated-normal and strongly autocorrelated samples. Into each clean training, spikes of
3 to 1,000 sigma are set, one in 40 steps, in the gradient norm and the loss by turns: a sample becomes the
local level (median of the 17 around it) plus k sigma, where sigma is the standard deviation of the 128
samples before it about their running level (at least 2 % of the norm and 0.4 % of the highest loss: on a data
set known by heart 10 sigma would be nothing), and the norm is in logarithms. A spike is found if its own step
is flagged. In the training with bad data the delay of the first flag, up to 10 steps, is measured too.

Writes docs/benchmarks/detectors.json and .md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from results import write_results

from harness.stability.detectors import RULES, make_rule

FOLDER = Path(__file__).parents[1] / "docs" / "benchmarks"
SIGMAS = (3, 5, 7.5, 10, 30, 100, 1000)
SPACING, FIRST = 40, 300
LONGEST_DELAY = 10
LEAST_SIGMA_LOG_NORM, LEAST_SIGMA_LOSS = 0.02, 0.004
NOISE_STEPS = 20_000
CLEAN = (
    "decoder", "decoder-unclipped", "decoder-bf16", "digits-cnn", "digits-cnn-noisy", "digits-mlp",
    "digits-mlp-noisy",
)  # fmt: skip
UNSTABLE = (
    "decoder-raw-text", "decoder-high-lr", "decoder-no-warmup", "digits-mlp-diverging", "decoder-fp16",
    "digits-cnn-high-lr",
)  # fmt: skip

Samples = NDArray[np.float64]


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


def made_up(steps: int) -> dict[str, Series]:
    """Noise about a constant level: 10 % of the norm and 4 % of the loss, as in the recorded decoders."""
    rng = np.random.default_rng(0)

    def autocorrelated() -> Samples:
        noise = rng.standard_normal(steps)
        for step in range(1, steps):
            noise[step] += 0.9 * noise[step - 1]
        return noise

    kinds = {
        "normal": lambda: rng.standard_normal(steps),
        "laplace": lambda: rng.laplace(size=steps) / math.sqrt(2),
        "contaminated": lambda: rng.standard_normal(steps) * np.where(rng.random(steps) < 0.02, 2.0, 1.0),
        "autocorrelated": autocorrelated,
    }
    return {name: Series(0.1 * draw(), 2.5 + 0.1 * draw()) for name, draw in kinds.items()}


def flags(rule_name: str, series: Series) -> NDArray[np.bool_]:
    """What a fresh rule says of each step."""
    rule = make_rule(rule_name)
    log_norms, losses = torch.from_numpy(series.log_norm), torch.from_numpy(series.loss)
    trusted = log_norms.isfinite() & losses.isfinite()
    verdicts = [rule.judge(*step).flagged for step in zip(log_norms, losses, trusted, strict=True)]
    return torch.stack(verdicts).numpy()


def level_and_sigma(samples: Samples) -> tuple[Samples, Samples]:
    """Of a clean series at each step from `FIRST` on: level around it, spread before it."""
    windows = np.lib.stride_tricks.sliding_window_view
    level = np.median(windows(np.pad(samples, 8, mode="edge"), 17), axis=1)
    sigma = windows(np.pad(samples - level, (128, 0)), 128)[:-1].std(axis=1)
    return level, sigma


def injected(series: Series, size: float) -> tuple[Series, list[int]]:
    """The series with spikes of `size` sigma, and their steps."""
    steps = np.arange(FIRST, len(series.loss) - LONGEST_DELAY, SPACING)
    log_norm, loss = series.log_norm.copy(), series.loss.copy()
    floors = LEAST_SIGMA_LOG_NORM, LEAST_SIGMA_LOSS * loss.max()
    for samples, least, chosen in zip((log_norm, loss), floors, (steps[::2], steps[1::2]), strict=True):
        level, sigma = level_and_sigma(samples)
        samples[chosen] = level[chosen] + size * np.maximum(sigma, least)[chosen]
    return Series(log_norm, loss), steps.tolist()


def recall(rule: str, clean: dict[str, Series]) -> dict[str, list[int]]:
    """Per size: spikes found in their own step, and spikes."""
    result: dict[str, list[int]] = {}
    for size in SIGMAS:
        counts = np.zeros(2, dtype=int)
        for series in clean.values():
            spiked, steps = injected(series, size)
            counts += (int(flags(rule, spiked)[steps].sum()), len(steps))
        result[f"{size:g}"] = counts.tolist()
    return result


def bad_batches_found(rule: str) -> str:
    """Batches of random bytes in a real training: found of how many, and how late on average."""
    series = recorded("decoder-bad-data")
    flagged = flags(rule, series)
    windows = [np.flatnonzero(flagged[step : step + LONGEST_DELAY]) for step in series.bad_steps]
    delays = [int(window[0]) for window in windows if len(window)]
    late = f", {np.mean(delays):.1f} steps late" if delays else ""
    return f"{len(delays)} of {len(windows)}{late}"


def rows() -> dict[str, dict[str, object]]:
    """What is measured, and each rule's result."""
    clean = {name: recorded(name) for name in CLEAN}
    noise = made_up(NOISE_STEPS)
    table: dict[str, dict[str, object]] = {}
    for kind, all_series in (("training", clean), ("noise", noise)):
        for name, series in all_series.items():
            title = f"false alarms: {kind} {name}, {len(series.loss):,} steps"
            table[title] = {rule: int(flags(rule, series).sum()) for rule in RULES}
    recalls = {rule: recall(rule, clean) for rule in RULES}
    for size, (_, num) in recalls["robust"].items():
        title = f"found in their own step: {num} spikes of {size} sigma"
        table[title] = {rule: recalls[rule][size][0] for rule in RULES}
    table["found: batches of random bytes"] = {rule: bad_batches_found(rule) for rule in RULES}
    for name in UNSTABLE:
        series = recorded(name)
        title = f"flagged: {name}, {len(series.loss):,} steps"
        table[title] = {rule: int(flags(rule, series).sum()) for rule in RULES}
    return table


def main() -> None:
    torch.set_num_threads(1)
    about = {"spikes": f"one in {SPACING} steps", "noise_steps": NOISE_STEPS}
    write_results("detectors", rows(), device=torch.device("cpu"), about=about)


if __name__ == "__main__":
    main()
