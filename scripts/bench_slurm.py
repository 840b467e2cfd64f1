"""Strikes jobs of a real Slurm: does `launch/slurm.sbatch` save, queue again and go on as the same run?

    python scripts/bench_slurm.py [--trials 3] [--seed 0] [--events pre-emption "node failure"]

Needs root and Debian's slurmctld, slurmd, slurm-client and munge. Two nodes, both of them this machine, run
the job script as it is shipped, with one gloo process a node. Each event comes at a random moment: while the
job starts, or at a random step. The job has to come to its end by itself, never as FAILED, and to equal the
undisturbed run bit for bit; a stop may lose no step, a failure none that a checkpoint holds. The results go
to docs/benchmarks/slurm.*.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from chaos import arguments, compare  # noqa: E402  (the repository has to be on the path first)
from results import write_results  # noqa: E402

from tests.support.launch import launch  # noqa: E402
from tests.support.runs import wait_for  # noqa: E402
from tests.support.slurm import NODES, SCRIPT, Slurm, free_ports, why_not  # noqa: E402

__all__ = ["EVENTS", "Job", "run_undisturbed", "trial"]

TIMEOUT_S = 900.0
SLOW_STEPS = range(8, 50)
ENDED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "PREEMPTED",
    "BOOT_FAIL",
    "OUT_OF_MEMORY",
)


@dataclass(frozen=True, slots=True)
class Job:
    """A training that runs as a job."""

    slurm: Slurm
    name: str
    number: str

    @classmethod
    def submitted(
        cls, slurm: Slurm, name: str, *options: str, slow_s: float = 0.0, more: tuple[str, ...] = ()
    ) -> Job:
        """The job script as shipped, but for `options`; each of `SLOW_STEPS` takes `slow_s` longer."""
        faults = ", ".join(f"{{step: {step}, kind: slow, seconds: {slow_s}}}" for step in SLOW_STEPS)
        number = slurm.submit(
            *options,
            str(SCRIPT),
            *arguments(slurm.folder, name, "ddp"),
            *([f"--faults=[{faults}]"] if slow_s else []),
            *more,
            NPROC="1",
            PORT=str(free_ports(1)[0]),
            PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            PYTHONPATH=str(ROOT),
            OMP_NUM_THREADS="1",
        )
        return cls(slurm, name, number)

    def wait_for_step(self, step: int) -> None:
        wait_for(
            lambda: self._has_ended() or max(self.steps()[-1], default=-1) >= step,
            timeout_s=TIMEOUT_S,
            what=f"step {step}",
        )
        assert not self._has_ended(), f"{self.state()}:\n{self.output()}"

    def wait_while_running(self) -> None:
        wait_for(
            lambda: self.state() not in ("RUNNING", "SIGNALING", "COMPLETING"),
            timeout_s=TIMEOUT_S,
            what="the end of the job",
        )

    def wait_for_end(self) -> str:
        wait_for(self._has_ended, timeout_s=TIMEOUT_S, what="the end of the job")
        return self.state()

    def state(self) -> str:
        return self.slurm.job(self.number)["JobState"]

    def num_starts(self) -> int:
        return int(self.slurm.job(self.number)["Restarts"]) + 1

    def output(self) -> str:
        return self.slurm.output(self.number)

    def steps(self) -> list[list[int]]:
        """The steps that each attempt of the program has logged."""
        found = re.findall(r'"kind":"step","attempt":(\d+),"step":(\d+),', self._log())
        return [
            [int(step) for attempt, step in found if int(attempt) == number]
            for number in range(1 + max((int(attempt) for attempt, _ in found), default=0))
        ]

    def _log(self) -> str:
        logs = sorted(self.slurm.folder.glob(f"runs/{self.name}/log/*.jsonl"))
        return "".join(path.read_text() for path in logs)

    def _has_ended(self) -> bool:
        return self.state() in ENDED


@dataclass(frozen=True, slots=True)
class Event:
    """What happens to a job, and how the job has to end."""

    strike: Callable[[Job], None] | None = None
    options: tuple[str, ...] = ()
    """Of sbatch."""
    slow_s: float = 0.2
    more: tuple[str, ...] = ()
    """Arguments of the program."""
    comes_by_itself: bool = False
    """Whether `strike` only follows it."""
    saves: bool = True
    """Whether it is a stop, which may lose no step."""
    state: str = "COMPLETED"
    starts: int = 2


def allow_an_hour(job: Job) -> None:
    """Once the job has come to its limit: on a busy machine the start alone takes minutes."""
    wait_for(lambda: job.num_starts() > 1, timeout_s=TIMEOUT_S, what="the time limit")
    job.slurm.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")


def requeue(job: Job) -> None:
    job.slurm.run("scontrol", "requeue", job.number)


def preempt(job: Job) -> None:
    """By a job of the other partition, which takes both nodes for a moment."""
    job.slurm.submit("--partition=high", "--nodes=2", "--exclusive", "--job-name=high", "--wrap=sleep 2")


def cancel(job: Job) -> None:
    job.slurm.run("scancel", job.number)


def ask_to_stop(job: Job) -> None:
    job.slurm.run("scancel", "--signal=TERM", job.number)


def fail(node: str) -> Callable[[Job], None]:
    def strike(job: Job) -> None:
        job.slurm.fail_node(node)
        job.wait_while_running()
        job.slurm.start_node(node)

    return strike


EVENTS = {
    "completion": Event(starts=1),
    # Slurm looks every 30 s: it comes two minutes or so after the start.
    "time limit": Event(
        allow_an_hour, options=("--time=4", "--signal=B:TERM@90"), slow_s=4.0, comes_by_itself=True
    ),
    "scontrol requeue": Event(requeue),
    "pre-emption": Event(preempt),
    "node failure": Event(fail(NODES[1]), saves=False),
    "failure of the first node": Event(fail(NODES[0]), saves=False),
    "scancel": Event(cancel, state="CANCELLED", starts=1),
    "scancel --signal=TERM": Event(ask_to_stop, state="FAILED", starts=1),
    "bad configuration": Event(more=("--loop.stepz=1",), state="FAILED", starts=1),
}


def run_undisturbed(folder: Path) -> None:
    """The run that every other one has to equal."""
    code, output = launch(arguments(folder, "ddp-whole", "ddp"), timeout_s=TIMEOUT_S)
    assert code == 0, output


def trial(
    slurm: Slurm, name: str, event: Event, draw: random.Random, *, may_start: bool = True
) -> float | None:
    """One job and one event; the seconds from the event until the job had left its nodes.

    Args:
        may_start: Whether the event may also come while the job starts.

    Raises:
        AssertionError: it did not end as it should.
    """
    job = Job.submitted(slurm, name, *event.options, slow_s=event.slow_s, more=event.more)
    struck = _strike(job, event, draw, may_start) if event.strike else None
    took_s = None
    if struck is not None and not event.comes_by_itself:
        job.wait_while_running()
        took_s = time.monotonic() - struck
    state = job.wait_for_end()
    said = f"{state} after {job.num_starts()} starts, steps {job.steps()}:\n{job.output()}"
    assert (state, job.num_starts()) == (event.state, event.starts), said
    if event.saves:
        for before, after in zip(job.steps(), job.steps()[1:], strict=False):
            assert not before or not after or after[0] == before[-1] + 1, said
    if state == "COMPLETED":
        compare(slurm.folder, "ddp-whole", name)
    return took_s


def _strike(job: Job, event: Event, draw: random.Random, may_start: bool) -> float:
    """At a random moment; when."""
    assert event.strike
    if event.comes_by_itself:
        pass
    elif may_start and draw.random() < 0.25:
        wait_for(lambda: job.state() == "RUNNING", what="the job's start")
        time.sleep(draw.uniform(0.0, 8.0))
    else:
        job.wait_for_step(draw.randint(9, 40))
        time.sleep(draw.uniform(0.0, 0.5))
    began = time.monotonic()
    event.strike(job)
    return began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--events", nargs="*", default=list(EVENTS), choices=list(EVENTS))
    parser.add_argument("--dry", action="store_true", help="write no results")
    options = parser.parse_args()
    if (reason := why_not()) is not None:
        raise SystemExit(reason)
    outcomes: dict[str, list[float | AssertionError | None]] = {name: [] for name in options.events}
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        Slurm.started(Path(folder)) as slurm,
    ):
        run_undisturbed(slurm.folder)
        for number, event in itertools.product(range(options.trials), options.events):
            outcomes[event].append(_attempt(slurm, event, number, options.seed))
            if not options.dry:
                rows = {name: _row(seen) for name, seen in outcomes.items() if seen}
                write_results("slurm", rows, device=torch.device("cpu"), about={"seed": options.seed})


def _attempt(slurm: Slurm, event: str, number: int, seed: int) -> float | AssertionError | None:
    draw = random.Random(f"{event} {seed} {number}")
    try:
        took_s = trial(slurm, f"{event.replace(' ', '-')}-{number}", EVENTS[event], draw)
    except AssertionError as error:
        print(f"{event} {number}: {error}", flush=True)
        return error
    print(f"{event} {number}: as promised, {took_s or 0:.1f} s", flush=True)
    return took_s


def _row(outcomes: list[float | AssertionError | None]) -> dict[str, object]:
    failures = sum(isinstance(each, AssertionError) for each in outcomes)
    seconds = [each for each in outcomes if isinstance(each, float)]
    return {
        "trials": len(outcomes),
        "as promised": len(outcomes) - failures,
        "median s": statistics.median(seconds) if seconds else None,
        "longest s": max(seconds, default=None),
    }


if __name__ == "__main__":
    main()
