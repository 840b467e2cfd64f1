"""Stops and kills a training at random moments: does it save what it should, and is it still the same?

    python scripts/bench_operations.py [--kills 100] [--stops 50] [--seed 0] [--launchers python torchrun]

*Stops*: under each launcher, runs are sent a signal (SIGTERM, SIGINT, SIGUSR1, SIGHUP, to a launcher also
SIGKILL; one in five twice) at a random moment: while they start, in a step, an evaluation, a save, a
rollback. Each has to end with every finished step in a committed checkpoint, the right exit code, status and
reason, and no process left.

*Kills*: two gloo processes under `torchrun --max-restarts 3`, of which one or both are killed by SIGKILL, up
to three times a run: while they start, in a step, in a save. Each run has to come to its end under the same
agent and to equal the undisturbed run bit for bit. The results go to docs/benchmarks/operations.*.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from chaos import arguments, compare, run_whole  # noqa: E402  (the repository has to be on the path first)
from results import summarise, write_results  # noqa: E402

from tests.support.operations import LAUNCHERS, Launched, begin, judge_stop  # noqa: E402

__all__ = ["kill_run", "stop_run"]

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP]
MOMENTS = ("start", "training", "training", "rollback")
VICTIMS = ("one rank in a step", "all ranks in a step", "one rank at the start", "one rank in a save")
SPIKES = "--faults=[" + ", ".join(f"{{step: {step}, kind: nan}}" for step in (20, 21, 22)) + "]"
STOPPED = (
    *("--loop.steps=100000", "--checkpoint.every=3", "--loop.eval_every=5", "--loop.eval_samples=64"),
    *("--loop.micro_batch=2", "--checkpoint.healthy_after=4", "--guard.max_consecutive_skips=2", SPIKES),
)
TIMEOUT_S = 300.0


def stop_run(launcher: str, folder: Path, draw: random.Random) -> tuple[str, float]:
    """Starts a run, stops it at a random moment and judges the end; what was done, and the seconds it took.

    Raises:
        AssertionError: something is not as it should be.
    """
    number = draw.choice(SIGNALS if launcher == "python" else [*SIGNALS, signal.SIGKILL])
    moment, twice = (
        draw.choice(MOMENTS),
        draw.random() < 0.2 and number not in (signal.SIGKILL, signal.SIGINT),
    )
    run = begin(launcher, folder, *STOPPED)
    run.wait_for_ranks()
    if moment == "training":
        run.wait_for_step(1)
    elif moment == "rollback":
        run.wait_for_step(20)
    time.sleep(draw.uniform(0.0, {"start": 6.0, "training": 2.0, "rollback": 0.3}[moment]))
    stop = judge_stop(run, number, twice=twice)
    what = f"{number.name}{' twice' if twice else ''}, {moment}"
    troubles = stop.troubles(launcher, number)
    assert not troubles, f"{launcher}, {what}:\n" + "\n".join(troubles)
    return what, stop.seconds


def kill_run(folder: Path, name: str, draw: random.Random, *, most_kills: int) -> Counter[str]:
    """Runs under an agent that restarts, killing again and again; the kills by victim.

    Raises:
        AssertionError: the run does not come to its end, or differs from the undisturbed one.
    """
    run = begin("torchrun", folder, *arguments(folder, name, "ddp"), name=name, options=("--max-restarts=3",))
    kills: Counter[str] = Counter()
    step = 0
    for _ in range(min(3, most_kills)):
        victim = draw.choice(VICTIMS)
        step += draw.randint(3, 15)
        ranks = _wait_for_victims(run, victim, step, draw)
        for rank in ranks if victim.startswith("all") else ranks[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)
        kills[victim] += bool(ranks)
        _wait_until_gone(run, ranks)
    output, _ = run.process.communicate(timeout=TIMEOUT_S)
    assert run.process.returncode == 0, f"{name}, {dict(kills)}:\n{output}"
    compare(folder, "ddp-whole", name)
    return kills


def _wait_for_victims(run: Launched, victim: str, step: int, draw: random.Random) -> list[int]:
    """The ranks' numbers in a random order, once the moment has come."""
    ranks = [process.pid for process in run.wait_for_ranks()]
    if victim.endswith("start"):
        time.sleep(draw.uniform(0.0, 6.0))
    else:
        run.wait_for_any_step(step)
    if victim.endswith("save"):
        run.wait_for_save()
    draw.shuffle(ranks)
    return ranks


def _wait_until_gone(run: Launched, ranks: list[int]) -> None:
    """Until the agent has ended the attempt, of which one process at least was killed."""
    deadline = time.monotonic() + TIMEOUT_S
    while {rank.pid for rank in run.ranks()} & set(ranks) and time.monotonic() < deadline:
        time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--stops", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--launchers", nargs="*", default=list(LAUNCHERS))
    parser.add_argument("--dry", action="store_true", help="write no results")
    options = parser.parse_args()
    rows = {f"stop under {name}": _stops(name, options.stops, options.seed) for name in options.launchers}
    if options.kills:
        rows["kill under torchrun --max-restarts 3"] = _kills(options.kills, options.seed)
    if not options.dry:
        write_results("operations", rows, device=torch.device("cpu"), about={"seed": options.seed})


def _stops(launcher: str, count: int, seed: int) -> dict[str, object]:
    seconds, failures = [], []
    for number in range(count):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
            try:
                what, took_s = stop_run(launcher, Path(name), random.Random(f"{launcher} {seed} {number}"))
            except AssertionError as error:
                print(f"{launcher} {number}: {error}", flush=True)
                failures.append(number)
                continue
        seconds.append(took_s)
        print(f"{launcher} {number}: {what}: saved and gone in {took_s:.2f} s", flush=True)
    timed = summarise(seconds) if seconds else {"p50": None, "p99": None}
    return {
        "cases": count,
        "as promised": count - len(failures),
        "p50 s": timed["p50"],
        "p99 s": timed["p99"],
    }


def _kills(count: int, seed: int) -> dict[str, object]:
    draw, kills, failures, runs = random.Random(f"kills {seed}"), Counter[str](), 0, 0
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        run_whole(folder, "ddp")
        while kills.total() < count:
            try:
                done = kill_run(folder, f"run-{runs}", draw, most_kills=count - kills.total())
            except AssertionError as error:
                print(f"run-{runs}: {error}", flush=True)
                failures, done = failures + 1, Counter({"failed": 3})
            kills += done
            print(f"run-{runs}: {dict(done)}, {kills.total()} kills so far", flush=True)
            runs += 1
    return {"cases": kills.total(), "as promised": kills.total() - kills["failed"], "runs": runs}


if __name__ == "__main__":
    main()
