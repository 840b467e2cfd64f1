"""The simulated clock of a training: what failures, saves and starts leave of its time."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from scripts.simulate_goodput import Costs, best_interval_s, failing_at, failing_at_rate, simulate

COSTS = Costs(start_s=10.0, step_s=1.0, save_s=0.5, commit_s=2.0, detect_s=5.0, steps_between=20)


def test_without_failures_only_start_and_saves_are_lost() -> None:
    assert simulate(COSTS, 100, failing_at([])) == pytest.approx(100 / (10.0 + 100 + 5 * 0.5))


@pytest.mark.parametrize(
    ("life_s", "kept"),
    [
        (9.0, 0),  # in the start
        (32.4, 0),  # step 20 is saved and not committed
        (32.6, 20),
        (53.0, 40),
    ],
)
def test_a_failure_costs_the_steps_since_the_last_commit_and_a_start(life_s: float, kept: int) -> None:
    left = 100 - kept
    wall_s = life_s + COSTS.detect_s + COSTS.start_s + left + left / 20 * COSTS.save_s
    assert simulate(COSTS, 100, failing_at([life_s])) == pytest.approx(100 / wall_s)


def test_the_interval_of_young_and_daly_is_better_than_half_and_twice_of_it() -> None:
    mean_s = 20_000.0
    costs = replace(COSTS, save_s=10.0, commit_s=0.0)

    def share(interval_s: float) -> float:
        lives = failing_at_rate(mean_s, random.Random(0))
        return simulate(replace(costs, steps_between=round(interval_s)), 10_000_000, lives)

    best_s = best_interval_s(10.0, mean_s)
    assert best_s == pytest.approx(math.sqrt(2 * 10 * mean_s))
    assert share(best_s) > max(share(best_s / 2), share(2 * best_s))
    # To first order the loss is that of half an interval per failure, and of a save per interval.
    lost = best_s / 2 / mean_s + 10.0 / best_s + (costs.start_s + costs.detect_s) / mean_s
    assert share(best_s) == pytest.approx(1 - lost, abs=0.004)
