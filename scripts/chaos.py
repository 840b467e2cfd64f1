"""Kills a training at random moments, again and again, and asks whether it is still the same training.

    python scripts/chaos.py [--kills 200] [--seed 0] [--strategies ddp fsdp]

For each strategy a run of two gloo processes is made once without interruption. Then the same run is started,
killed by SIGKILL after a random time, started again, and so on until it finishes; then the next one, until
there were enough kills. A kill takes one rank, all ranks, the launcher, or everything at once, at any moment:
starting, training, saving. Every finished run has to equal the uninterrupted one bit for bit: each step's
loss and norm in the log, once each, and the last weights. The results go to docs/benchmarks/chaos-*.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from harness.checkpoint import Checkpointer  # noqa: E402  (the repository has to be on the path first)
from harness.config import parse_arguments  # noqa: E402
from harness.models import build_model  # noqa: E402
from harness.runlog.reader import open_run  # noqa: E402
from tests.support.runs import PROGRAM, start, tiny  # noqa: E402

__all__ = ["Chaos", "compare", "run_whole"]

VICTIMS = ("one rank", "all ranks", "launcher", "everything")
LONGEST_LIFE_S = 12.0
TIMEOUT_S = 600.0
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@dataclass
class Chaos:
    """One training under fire, and what happened to it."""

    folder: Path
    strategy: str
    draw: random.Random
    kills: Counter[str] = field(default_factory=Counter)

    def run(self, name: str, *, most_kills: int) -> None:
        """Starts the run and kills it until it finishes, or lives on after `most_kills` kills."""
        while True:
            process = start([*LAUNCHER, PROGRAM, *arguments(self.folder, name, self.strategy)])
            life_s = self.draw.uniform(0.0, LONGEST_LIFE_S) if self.kills.total() < most_kills else TIMEOUT_S
            try:
                output, _ = process.communicate(timeout=life_s)
            except subprocess.TimeoutExpired:
                if life_s == TIMEOUT_S:
                    raise AssertionError(f"{name} hangs") from None
                self._strike(process)
                continue
            if process.returncode:
                raise AssertionError(f"{name} failed by itself:\n{output}")
            return

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


def arguments(folder: Path, name: str, strategy: str) -> list[str]:
    return tiny(
        folder,
        f"--name={name}",
        f"--parallel.strategy={strategy}",
        "--loop.steps=60",
        "--loop.micro_batch=2",
        "--model.dropout=0.1",
        "--checkpoint.every=3",
        "--checkpoint.healthy_after=4",
        "--loop.eval_every=15",
    )


def run_whole(folder: Path, strategy: str) -> None:
    """The run that nobody disturbs."""
    process = start([*LAUNCHER, PROGRAM, *arguments(folder, f"{strategy}-whole", strategy)])
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
    config = parse_arguments(arguments(folder, name, "ddp"))
    model = build_model(config.model, sequence_length=config.data.sequence_length)
    with Checkpointer(folder / "runs" / name / "checkpoints") as checkpoints:
        assert checkpoints.load({"model": model}) == config.loop.steps
    return model.state_dict()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strategies", nargs="+", default=["ddp", "fsdp"])
    options = parser.parse_args()
    from results import write_results

    for strategy in options.strategies:
        row = under_fire(strategy, options.kills // len(options.strategies), options.seed)
        about = {"seed": options.seed}
        write_results(f"chaos-{strategy}", {strategy: row}, device=torch.device("cpu"), about=about)


def under_fire(strategy: str, num_kills: int, seed: int) -> dict[str, object]:
    """Trains and kills until there were `num_kills` kills; how it went."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_whole(folder, strategy)
        chaos = Chaos(folder, strategy, random.Random(f"{strategy} {seed}"))
        num_runs = 0
        while chaos.kills.total() < num_kills:
            run = f"{strategy}-{num_runs}"
            chaos.run(run, most_kills=num_kills)
            compare(folder, f"{strategy}-whole", run)
            num_runs += 1
            print(f"{run}: equal after {chaos.kills.total()} kills so far", flush=True)
    return {
        "kills": chaos.kills.total(),
        **{f"of {victim}": chaos.kills[victim] for victim in VICTIMS},
        "finished runs": num_runs,
        "all bitwise equal": "yes",
        "minutes": round((time.monotonic() - began) / 60, 1),
    }


if __name__ == "__main__":
    main()
