"""Stops and kills a training at random moments: does it save what it should, and is it still the same?

    python scripts/bench_operations.py [--kills 100] [--stops 50] [--hangs 36] [--seed 0]
        [--launchers python torchrun] [--journal FILE] [--minutes M]

*Stops*: under each launcher, runs are sent a signal (SIGTERM, SIGINT, SIGUSR1, SIGHUP, to a launcher also
SIGKILL; one in five twice) at a random moment: while they start, in a step, an evaluation, a save, a
rollback. Each has to end with every finished step in a committed checkpoint, the right exit code, status and
reason, and no process left.

*Kills*: two gloo processes under `torchrun --max-restarts`, of which one or both are killed by SIGKILL,
several times a run: while they start, in a step, in a save. Each run has to come to its end under the same
agent and to equal the undisturbed run bit for bit. `--forked-kills N` is the same with ranks
that torchrun's agent forks from a process which has loaded everything: where a start takes minutes otherwise.

*Hangs*: of two ranks one hangs, is stopped by SIGSTOP, takes too long, or is late and within
its limit: while it starts, waits for a batch, in a forward or backward pass, a callback, an evaluation, a
save, and in the thread that writes a checkpoint. The right rank has to be named in time, and a late one not.

Each trial is drawn from the seed and its number, and noted in the journal when it is done; those that are in
it are not done again. So the trials can be done in pieces, and a failed one again, once its line is deleted.
The results, of all trials in the journal, go to docs/benchmarks/operations.*.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from chaos import arguments, compare, run_whole  # noqa: E402  (the repository has to be on the path first)
from hang_trials import hang_run  # noqa: E402
from results import summarise, write_results  # noqa: E402

from tests.support.operations import FORKING, LAUNCHERS, Launched, begin, judge_stop  # noqa: E402

__all__ = ["kill_run", "stop_run"]

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP]
MOMENTS = ("start", "training", "training", "rollback")
VICTIMS = ("one rank in a step", "all ranks in a step", "one rank at the start", "one rank in a save")
KILLS_PER_RUN = {"torchrun": 3, FORKING: 9}
SPIKES = "--faults=[" + ", ".join(f"{{step: {step}, kind: nan}}" for step in (20, 21, 22)) + "]"
STOPPED = (
    *("--loop.steps=100000", "--checkpoint.every=3", "--loop.eval_every=5", "--loop.eval_samples=64"),
    *("--loop.micro_batch=2", "--checkpoint.healthy_after=4", "--guard.max_consecutive_skips=2", SPIKES),
)
TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One that was done."""

    kind: str
    number: int
    what: str
    cases: int
    seconds: float | None
    """From what was done to the run to its answer."""
    trouble: str
    """What was not as promised; empty if all was."""


def stop_run(launcher: str, folder: Path, draw: random.Random) -> tuple[str, int, float]:
    """Starts a run, stops it at a random moment and judges the end; what was done, and the seconds it took.

    Raises:
        AssertionError: something is not as it should be.
    """
    number = draw.choice(SIGNALS if launcher == "python" else [*SIGNALS, signal.SIGKILL])
    moment, twice = (
        draw.choice(MOMENTS),
        draw.random() < 0.2 and number not in (signal.SIGKILL, signal.SIGINT),
    )
    with begin(launcher, folder, *STOPPED, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="300") as run:
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
    return what, 1, stop.seconds


def kill_run(
    folder: Path, name: str, draw: random.Random, *, launcher: str = "torchrun"
) -> tuple[str, int, None]:
    """Runs under an agent that restarts, killing again and again; the victims.

    Raises:
        AssertionError: the run does not come to its end, or differs from the undisturbed one.
    """
    kills: Counter[str] = Counter()
    most_kills = KILLS_PER_RUN[launcher]
    restarting = (f"--max-restarts={most_kills}",)
    with begin(launcher, folder, *arguments(folder, name, "ddp"), name=name, options=restarting) as run:
        step = 0
        for _ in range(most_kills):
            victim = draw.choice(VICTIMS)
            step += draw.randint(3, 45 // most_kills)
            ranks = _wait_for_victims(run, victim, step, draw)
            for rank in ranks if victim.startswith("all") else ranks[:1]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank, signal.SIGKILL)
            kills[victim] += bool(ranks)
            _wait_until_gone(run, ranks)
        output, _ = run.process.communicate(timeout=TIMEOUT_S)
    what = ", ".join(f"{count} {victim}" for victim, count in kills.items())
    assert run.process.returncode == 0, f"{name}, {what}:\n{output}"
    compare(folder, "ddp-whole", name)
    return what, kills.total(), None


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
    parser.add_argument("--forked-kills", type=int, default=0)
    parser.add_argument("--stops", type=int, default=50)
    parser.add_argument("--hangs", type=int, default=36)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--launchers", nargs="*", default=list(LAUNCHERS))
    parser.add_argument("--journal", type=Path, help="the trials that are done, one a line")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no trial after so many")
    parser.add_argument("--dry", action="store_true", help="write no results")
    options = parser.parse_args()
    _handle_signals_as_usual()
    done = {(trial.kind, trial.number): trial for trial in _read(options.journal)}
    ends = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        for kind, number, attempt in _planned(options, Path(name)):
            if (kind, number) not in done and time.monotonic() < ends:
                done[kind, number] = trial = _tried(kind, number, options.seed, attempt)
                print(json.dumps(asdict(trial)), flush=True)
                if options.journal:
                    with options.journal.open("a") as journal:
                        journal.write(json.dumps(asdict(trial)) + "\n")
    if not options.dry:
        about = {"seed": options.seed}
        write_results("operations", _rows(list(done.values())), device=torch.device("cpu"), about=about)


def _handle_signals_as_usual() -> None:
    """nohup, and a shell that starts this in the background, would have the runs ignore some of them."""
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


Attempt = Callable[[random.Random], tuple[str, int, float | None]]


def _planned(options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, int, Attempt]]:
    """All trials, those of each kind in turn, so that after any number of them each kind has had its part."""
    columns = [_stops(name, options.stops, folder) for name in options.launchers]
    for launcher, count in (("torchrun", options.kills), (FORKING, options.forked_kills)):
        columns.append(_kills(launcher, -(-count // KILLS_PER_RUN[launcher]), folder))
    columns.append(_hangs(options.hangs, folder))
    for row in zip_longest(*columns):
        yield from (trial for trial in row if trial is not None)


def _stops(launcher: str, count: int, folder: Path) -> Iterator[tuple[str, int, Attempt]]:
    for number in range(count):
        where = folder / f"{launcher}-{number}"
        yield f"stop under {launcher}", number, lambda draw, where=where: stop_run(launcher, where, draw)


def _kills(launcher: str, num_runs: int, folder: Path) -> Iterator[tuple[str, int, Attempt]]:
    def attempt(number: int, draw: random.Random) -> tuple[str, int, None]:
        if not (folder / "runs/ddp-whole").exists():
            run_whole(folder, "ddp")
        return kill_run(folder, f"{launcher}-{number}", draw, launcher=launcher)

    for number in range(num_runs):
        yield (
            f"kill under {launcher} --max-restarts",
            number,
            lambda draw, number=number: attempt(number, draw),
        )


def _hangs(count: int, folder: Path) -> Iterator[tuple[str, int, Attempt]]:
    for number in range(count):
        where = folder / f"hang-{number}"
        yield (
            "hang",
            number,
            lambda draw, where=where, number=number: hang_run(where, draw, number),
        )


def _tried(kind: str, number: int, seed: int, attempt: Attempt) -> Trial:
    try:
        what, cases, seconds = attempt(random.Random(f"{kind} {seed} {number}"))
    except (AssertionError, subprocess.TimeoutExpired) as error:
        return Trial(kind=kind, number=number, what="", cases=1, seconds=None, trouble=str(error))
    return Trial(kind=kind, number=number, what=what, cases=cases, seconds=seconds, trouble="")


def _read(journal: Path | None) -> list[Trial]:
    if journal is None or not journal.exists():
        return []
    return [Trial(**json.loads(line)) for line in journal.read_text().splitlines()]


def _rows(trials: list[Trial]) -> dict[str, dict[str, object]]:
    rows: dict[str, dict[str, object]] = {}
    for kind in dict.fromkeys(trial.kind for trial in trials):
        done = [trial for trial in trials if trial.kind == kind]
        timed = [trial.seconds for trial in done if trial.seconds is not None]
        rows[kind] = {
            "cases": sum(trial.cases for trial in done),
            "as promised": sum(trial.cases for trial in done if not trial.trouble),
            "runs": len(done),
            "p50 s": summarise(timed)["p50"] if timed else None,
            "p99 s": summarise(timed)["p99"] if timed else None,
        }
    return rows


if __name__ == "__main__":
    main()
