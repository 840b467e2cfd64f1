"""How much of its time a training spends on steps that count, by failure rate, restart and checkpoints.

    python scripts/simulate_goodput.py [--seed 0]

A simulation of a training's clock: start, steps, saves that training waits for, a failure at a random moment
(or at given ones), the time until it is noticed, and the start again from the last committed checkpoint.

First it is tried on the trainings that scripts/chaos.py has killed (docs/benchmarks/chaos-times-*.json): with
the times of their starts, steps, saves and ends, and the moments of their kills, it says what share of the
time should have been effective. Then it states that share for 8 to 16,384 GPUs at the failure rate of Llama 3
(466 interruptions in 54 days on 16,384 GPUs, arXiv:2407.21783), with the interval between checkpoints
that is best by Young (1974) and Daly (2006): sqrt(2 x time of a save x mean time between failures).

Results go to docs/benchmarks/goodput.*.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

__all__ = ["Costs", "best_interval_s", "failing_at", "failing_at_rate", "simulate"]

DAY_S = 86_400.0
LLAMA_3_GPUS, LLAMA_3_FAILURES, LLAMA_3_DAYS = 16_384, 466, 54.0
GPUS = (8, 64, 512, 2048, 8192, 16_384)
DAYS = 54.0
TRIALS = 5


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What takes how long, in seconds."""

    start_s: float
    """From the start of all processes to the first step."""
    step_s: float
    save_s: float
    """How long training waits for a checkpoint."""
    commit_s: float
    """From there until it is committed, while training goes on."""
    detect_s: float
    """From a failure until the processes are started again."""
    end_s: float = 0.0
    """From the last save until all processes are gone."""
    steps_between: int
    """Steps from one checkpoint to the next."""


def simulate(costs: Costs, num_steps: int, lives: Iterator[float]) -> float:
    """The share of the wall time of `num_steps` steps in which steps were made for good.

    Args:
        lives: How long the processes live after each start, in seconds.
    """
    done, wall_s = 0, 0.0
    while done < num_steps:
        life_s = next(lives)
        needed_s, saved = _until(costs, done, num_steps, life_s)
        wall_s += min(needed_s, life_s)
        if needed_s > life_s:
            wall_s += costs.detect_s
        done = saved
    return num_steps * costs.step_s / wall_s


def _until(costs: Costs, done: int, num_steps: int, life_s: float) -> tuple[float, int]:
    """How long it would take from a start to the end, and how many steps are committed after `life_s`."""
    first = costs.steps_between - done % costs.steps_between
    round_s = costs.steps_between * costs.step_s + costs.save_s
    num_saves = -(-(num_steps - done) // costs.steps_between)
    needed_s = costs.start_s + (num_steps - done) * costs.step_s + num_saves * costs.save_s + costs.end_s
    if needed_s <= life_s:
        return needed_s, num_steps
    lived_s = life_s - costs.start_s - first * costs.step_s - costs.save_s - costs.commit_s
    if lived_s < 0:
        return needed_s, done
    rounds = int(lived_s / round_s)
    return needed_s, min(num_steps, done + first + rounds * costs.steps_between)


def failing_at(lives_s: list[float]) -> Iterator[float]:
    """These lives, and then one without an end."""
    yield from lives_s
    while True:
        yield math.inf


def failing_at_rate(mean_s: float, draw: random.Random) -> Iterator[float]:
    """Failures that come at random, independently of each other."""
    while True:
        yield draw.expovariate(1.0 / mean_s)


def best_interval_s(save_s: float, mean_s: float) -> float:
    """Seconds between checkpoints that lose least to saves and to steps made again: J. W. Young (1974), A
    first order approximation to the optimum checkpoint interval; J. T. Daly (2006) has higher orders."""
    return math.sqrt(2.0 * save_s * mean_s)


def of_chaos(path: Path) -> dict[str, object]:
    """What the simulation says of a training that was killed, and what was seen."""
    content = json.loads(path.read_text())
    (times,) = content["times"].values()
    about = content["about"]
    (row,) = content["rows"].values()
    costs = Costs(
        start_s=times["start_s"],
        step_s=times["step_s"],
        save_s=times["save_s"],
        commit_s=times["save_s"],
        detect_s=times["clearing_s"],
        end_s=times.get("end_s", 0.0),
        steps_between=about["every"],
    )
    runs = [[float(life) for life in run.split()[:-1]] for run in times["lives_s"].split(";")]
    shares = [simulate(costs, about["steps"], failing_at(lives_s)) for lives_s in runs]
    said = len(shares) / sum(1.0 / share for share in shares)  # one after the other
    num_steps = row["finished runs"] * about["steps"]
    seen = times["effective_frac"]
    return {"kills": row["kills"], "steps": num_steps, "predicted %": 100 * said, "seen %": 100 * seen}


def at_scale(num_gpus: int, seed: int) -> dict[str, object]:
    """The effective share on so many GPUs, by the interval between checkpoints and the time of a start."""
    mean_s = LLAMA_3_DAYS * DAY_S / LLAMA_3_FAILURES * LLAMA_3_GPUS / num_gpus
    costs = costs_at(num_gpus)
    best_s = best_interval_s(costs.save_s, mean_s)
    shares = {
        "every 3 h": _share(10800.0, mean_s, seed, costs),
        "every 10 min": _share(600.0, mean_s, seed, costs),
        "best": _share(best_s, mean_s, seed, costs),
        "best, start of 300 s": _share(best_s, mean_s, seed, replace(costs, start_s=300.0)),
        "best, start of 600 s": _share(best_s, mean_s, seed, replace(costs, start_s=600.0)),
        "best, failure found after 600 s": _share(best_s, mean_s, seed, replace(costs, detect_s=600.0)),
    }
    return {
        "h between failures": mean_s / 3600,
        "save s": costs.save_s,
        "best interval min": best_s / 60,
        **{f"{name} %": 100 * share for name, share in shares.items()},
    }


MESSAGE_S = 30e-6
"""An assumption: a small message between machines, on an ordinary network."""
EXCHANGES = 8
"""Rings that training waits for in a save (docs/scaling.md)."""


def costs_at(num_gpus: int) -> Costs:
    """What is known of a job of so many GPUs, and what is assumed.

    `start_s` was seen once, of a killed worker of a tiny model on two busy cores (docs/benchmarks/hosts.md);
    `detect_s` is `parallel.silent_s`. `save_s` is 1 s to copy 10 GB on each writing rank to the host (0.28 s
    for 3 GB, docs/benchmarks/checkpoint.md), and its exchanges; `commit_s` is 10 GB at 170 MB/s, a rank's
    share of a file system, and a manifest of 405 B parameters in 512 shards. `step_s` is of the order of
    Llama 3's.
    """
    save_s = 1.0 + EXCHANGES * (num_gpus - 1) * MESSAGE_S
    return Costs(
        start_s=134.0, step_s=5.0, save_s=save_s, commit_s=60.0 + 9.0, detect_s=15.0, steps_between=1
    )


def _share(interval_s: float, mean_s: float, seed: int, costs: Costs) -> float:
    costs = replace(costs, steps_between=max(1, round(interval_s / costs.step_s)))
    num_steps = round(DAYS * DAY_S / costs.step_s)
    draws = [random.Random(f"{seed} {number}") for number in range(TRIALS)]
    shares = [simulate(costs, num_steps, failing_at_rate(mean_s, draw)) for draw in draws]
    return sum(shares) / TRIALS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    from results import FOLDER, write_results

    tried = {path.stem: of_chaos(path) for path in sorted(FOLDER.glob("chaos-times-*.json"))}
    rows = {f"{num_gpus} GPUs": at_scale(num_gpus, options.seed) for num_gpus in GPUS}
    write_results(
        "goodput",
        rows,
        device=torch.device("cpu"),
        about={"seed": options.seed, "days": DAYS, "trials": TRIALS},
        sections={"killed trainings": tried} if tried else None,
    )


if __name__ == "__main__":
    main()
