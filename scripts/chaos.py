"""Kills a training at random moments, again and again, and asks whether it is still the same training.

    python scripts/chaos.py [--kills 200] [--seed 0] [--strategies ddp fsdp]
    python scripts/chaos.py --in-place --steps 600 --every 30 --longest-life-s 60 --name chaos-times

For each strategy a run of two gloo processes is made once without interruption. Then the same run is started,
killed by SIGKILL after a random time, started again, and so on until it finishes; then the next one, until
there were enough kills. A kill takes one rank, all ranks, the launcher, or everything at once, at any moment:
starting, training, saving. Every finished run has to equal the uninterrupted one bit for bit: each step's
loss and norm in the log, once each, and the last weights. The results go to docs/benchmarks/chaos-*, with the
times that scripts/simulate_goodput.py needs: the second call, of longer runs, is the one that it is tried on.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import psutil
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from harness.checkpoint import Checkpointer  # noqa: E402  (the repository has to be on the path first)
from harness.config import parse_arguments  # noqa: E402
from harness.models import build_model  # noqa: E402
from harness.runlog.ledger import TimeClass, newest_ledger  # noqa: E402
from harness.runlog.reader import open_run  # noqa: E402
from tests.support.forked_agent import NUM_RANKS, is_forked_rank  # noqa: E402
from tests.support.runs import PROGRAM, start, tiny  # noqa: E402

__all__ = ["Chaos", "Plan", "compare", "run_whole"]

VICTIMS = ("one rank", "all ranks", "launcher", "everything")
TIMEOUT_S = 1800.0
FORKING = [sys.executable, "-m", "tests.support.forked_agent"]
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@dataclass(frozen=True)
class Plan:
    """What is trained, and how long it is left alone."""

    steps: int = 60
    every: int = 3
    """Steps between checkpoints."""
    longest_life_s: float = 12.0
    in_place: bool = False
    """Ranks alone are killed, under an agent that starts them again, and the end is not compared."""


@dataclass
class Life:
    """One start of a run, until it was killed or at its end."""

    run: str
    began: float
    """In seconds since the epoch."""
    lived_s: float
    clearing_s: float | None = None
    """From the kill until the next start could be made; None: it was not killed."""


@dataclass
class Chaos:
    """One training under fire, and what happened to it."""

    folder: Path
    strategy: str
    draw: random.Random
    plan: Plan
    kills: Counter[str] = field(default_factory=Counter)
    lives: list[Life] = field(default_factory=list)

    def run(self, name: str, *, most_kills: int) -> None:
        """Starts the run and kills it until it finishes, or lives on after `most_kills` kills."""
        while True:
            began = time.time()
            process = start([*LAUNCHER, PROGRAM, *arguments(self.folder, name, self.strategy, self.plan)])
            longest_s = self.plan.longest_life_s
            life_s = self.draw.uniform(0.0, longest_s) if self.kills.total() < most_kills else TIMEOUT_S
            try:
                output, _ = process.communicate(timeout=life_s)
            except subprocess.TimeoutExpired:
                if life_s == TIMEOUT_S:
                    raise AssertionError(f"{name} hangs") from None
                struck = time.time()
                self._strike(process)
                self.lives.append(Life(name, began, struck - began, time.time() - struck))
                continue
            if process.returncode:
                raise AssertionError(f"{name} failed by itself:\n{output}")
            self.lives.append(Life(name, began, time.time() - began))
            return

    def run_in_place(self, name: str, *, most_kills: int) -> None:
        """The same under one agent, which starts killed ranks again by itself."""
        restarting = [*FORKING, f"--max-restarts={2 * most_kills}", PROGRAM]
        # Into a file: nobody reads a pipe meanwhile, and one that is full stops the run.
        output = self.folder / f"{name}.txt"
        process = start([*restarting, *arguments(self.folder, name, self.strategy, self.plan)], output=output)
        self._forked_ranks(process)
        began = time.time()
        while self.kills.total() < most_kills:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(self.draw.uniform(0.0, self.plan.longest_life_s))
            ranks = self._forked_ranks(process)
            if not ranks:
                break
            victim = self.draw.choice(VICTIMS[:2])
            for pid in ranks if victim == "all ranks" else [self.draw.choice(ranks)]:
                kill(pid)
            self.kills[victim] += 1
            self.lives.append(Life(name, began, time.time() - began, 0.0))
            began = time.time()
        process.wait(TIMEOUT_S)
        if process.returncode:
            raise AssertionError(f"{name} failed by itself:\n{output.read_text()}")
        self.lives.append(Life(name, began, time.time() - began))

    def _forked_ranks(self, process: subprocess.Popen[str]) -> list[int]:
        """Waits until there are some, or the end."""
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):
                family = psutil.Process(process.pid).children(recursive=True)
                ranks = [child.pid for child in family if is_forked_rank(child)]
                if len(ranks) == NUM_RANKS:
                    return ranks
            time.sleep(0.2)
        return []

    def _strike(self, process: subprocess.Popen[str]) -> None:
        victim = self.draw.choice(VICTIMS)
        family = psutil.Process(process.pid).children(recursive=True)
        ranks = [child.pid for child in family if is_rank(child)]
        if victim == "one rank":
            ranks = [self.draw.choice(ranks)] if ranks else []
        for pid in ranks if victim != "launcher" else []:
            kill(pid)
        if victim in ("launcher", "everything") or not ranks:
            kill(process.pid)
        self.kills[victim] += 1
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=self.draw.uniform(0.5, 20.0))
        # Whoever is left, in the middle of whatever it does: as a scheduler clears a node.
        for child in family:
            if is_rank(child):
                kill(child.pid)
        kill(process.pid)
        process.communicate()


def is_rank(process: psutil.Process) -> bool:
    """Whether it is a training process that still lives, rather than the side process of one."""
    with contextlib.suppress(psutil.Error):
        return PROGRAM in process.cmdline()
    return False


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it came to its end by itself
        os.kill(pid, signal.SIGKILL)


def arguments(folder: Path, name: str, strategy: str, plan: Plan | None = None) -> list[str]:
    plan = plan or Plan()
    return tiny(
        folder,
        f"--name={name}",
        f"--parallel.strategy={strategy}",
        f"--loop.steps={plan.steps}",
        "--loop.micro_batch=2",
        "--model.dropout=0.1",
        f"--checkpoint.every={plan.every}",
        "--checkpoint.healthy_after=4",
        f"--loop.eval_every={plan.steps // 4}",
    )


def run_whole(folder: Path, strategy: str, plan: Plan | None = None) -> None:
    """The run that nobody disturbs."""
    process = start([*LAUNCHER, PROGRAM, *arguments(folder, f"{strategy}-whole", strategy, plan)])
    output, _ = process.communicate(timeout=TIMEOUT_S)
    if process.returncode:
        raise AssertionError(output)


def compare(folder: Path, one: str, other: str) -> None:
    """Raises unless two runs have the same steps, losses, norms and last weights, bit for bit."""
    runs = [open_run(folder / "runs" / name) for name in (one, other)]
    for metric in ("train/loss", "train/grad_norm", "train/lr", "train/tokens", "val/loss"):
        first, second = (run.scalars(metric) for run in runs)
        assert first.steps.tolist() == second.steps.tolist(), f"{other}: {metric} has other steps"
        assert first.values.tolist() == second.values.tolist(), f"{other}: {metric} differs"
    weights = [last_weights(folder, name) for name in (one, other)]
    differing = [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])]
    assert not differing, f"{other}: {differing} differ"


def last_weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    config = parse_arguments(tiny(folder, "--model.dropout=0.1"))
    model = build_model(config.model, sequence_length=config.data.sequence_length)
    with Checkpointer(folder / "runs" / name / "checkpoints") as checkpoints:
        step = checkpoints.load({"model": model})
    return {"step": torch.tensor(step), **model.state_dict()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strategies", nargs="+", default=["ddp", "fsdp"])
    parser.add_argument("--steps", type=int, default=Plan.steps)
    parser.add_argument("--every", type=int, default=Plan.every, help="steps between checkpoints")
    parser.add_argument("--longest-life-s", type=float, default=Plan.longest_life_s)
    parser.add_argument("--in-place", action="store_true", help="kill ranks alone; for their times")
    parser.add_argument("--name", default="chaos", help="of the results")
    options = parser.parse_args()
    plan = Plan(options.steps, options.every, options.longest_life_s, options.in_place)
    from results import write_results

    for strategy in options.strategies:
        row, times = under_fire(strategy, options.kills // len(options.strategies), options.seed, plan)
        about = {"seed": options.seed, **asdict(plan), "load": round(os.getloadavg()[2], 1)}
        write_results(
            f"{options.name}-{strategy}",
            {strategy: row},
            device=torch.device("cpu"),
            about=about,
            sections={"times": {strategy: times}},
        )


def under_fire(
    strategy: str, num_kills: int, seed: int, plan: Plan
) -> tuple[dict[str, object], dict[str, object]]:
    """Trains and kills until there were `num_kills` kills; how it went, and how long its parts took."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not plan.in_place:
            run_whole(folder, strategy, plan)
        chaos = Chaos(folder, strategy, random.Random(f"{strategy} {seed}"), plan)
        num_runs = 0
        while chaos.kills.total() < num_kills:
            run = f"{strategy}-{num_runs}"
            if plan.in_place:
                chaos.run_in_place(run, most_kills=num_kills)
            else:
                chaos.run(run, most_kills=num_kills)
                compare(folder, f"{strategy}-whole", run)
            num_runs += 1
            ended = "finished" if plan.in_place else "equal"
            print(f"{run}: {ended} after {chaos.kills.total()} kills so far", flush=True)
        times = _times(chaos)
    row = {
        "kills": chaos.kills.total(),
        **{f"of {victim}": chaos.kills[victim] for victim in VICTIMS},
        "finished runs": num_runs,
        "all bitwise equal": "not compared" if plan.in_place else "yes",
        "minutes": round((time.monotonic() - began) / 60, 1),
    }
    return row, times


def _times(chaos: Chaos) -> dict[str, object]:
    """How long starts, steps and saves took under fire, by the times in the logs."""
    starts_s, steps_s, saves_s, ends_s = [], [], [], []
    names = list(dict.fromkeys(life.run for life in chaos.lives))
    for name in names:
        logged = open_run(chaos.folder / "runs" / name).scalars("train/loss").times
        begins = [life.began for life in chaos.lives if life.run == name]
        lives = np.searchsorted(begins, logged, side="right")
        first = np.flatnonzero(np.diff(lives, prepend=0))
        starts_s += [logged[index] - begins[lives[index] - 1] for index in first]
        steps_s += np.diff(logged)[np.diff(lives) == 0].tolist()
        ends_s += [one.began + one.lived_s - logged[-1] for one in chaos.lives if one.run == name][-1:]
        ledger = newest_ledger(chaos.folder / "runs" / name)
        assert ledger is not None
        saves_s.append(ledger.seconds[TimeClass.CHECKPOINT] / (ledger.steps_made / chaos.plan.every))
    wall_s = sum(life.lived_s + (life.clearing_s or 0.0) for life in chaos.lives)
    clearing_s = [life.clearing_s for life in chaos.lives if life.clearing_s is not None]
    save_s = statistics.mean(saves_s)
    step_s = statistics.mean(steps_s) - save_s / chaos.plan.every
    return {
        "start_s": round(statistics.mean(starts_s), 2),
        "step_s": round(step_s, 4),
        "save_s": round(save_s, 4),
        "clearing_s": round(statistics.mean(clearing_s), 2),
        "end_s": round(statistics.mean(ends_s), 2),
        "wall_s": round(wall_s, 1),
        "effective_frac": round(len(names) * chaos.plan.steps * step_s / wall_s, 4),
        "lives_s": "; ".join(
            " ".join(f"{life.lived_s:.1f}" for life in chaos.lives if life.run == name) for name in names
        ),
    }


if __name__ == "__main__":
    main()
