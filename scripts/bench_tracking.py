"""How long one step's log holds up the training thread, by tracker, and what tracking costs a training.

    python scripts/bench_tracking.py [--steps 1000] [--rounds 3] [--also-python PYTHON]

Each measurement is a process of its own that logs steps of 10 or 300 floats, back to back and with 2 ms of
other work between; the trackers take turns. `blocked` is the time until the call returns, `CPU` the processor
time of the whole process per step, background threads included. trackio and
MLflow (on SQLite) are left out where they are not installed; PYTHON may be an interpreter that has them.
`torch` SummaryWriter and W&B (offline) are measured with their defaults, the harness with its side process
mirroring to TensorBoard and W&B.

The last figure trains a small network on all cores, in blocks without and with all mirrors, samples and
alerts. Each tracked block is compared to the two untracked ones around it; reported is the median of these
ratios. In untracked blocks the helper processes are stopped. Before each the mirrors catch up, and a tracked
block begins when they are in their stride, so that neither pays for the other. Where other programs use the
machine this says little: how many cores they used is reported too. `--only-throughput` takes this figure
alone, on the cores that it may use (`taskset`). Writes docs/benchmarks/tracking.json and .md, and
tracking-throughput.json and .md.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

Log = Callable[[int, dict[str, float]], None]
Write = Callable[[float], None]
METHODS = ("harness", "SummaryWriter", "W&B offline", "trackio", "MLflow SQLite")
NEEDS = {"trackio": "trackio", "MLflow SQLite": "mlflow"}
SIZES = (10, 300)
PAUSE_S = 0.002
WARM_UP = 20
NUM_PAIRS, BLOCK_S, WARM_UP_S = 20, 6.0, 4.0


@contextlib.contextmanager
def harness(folder: str) -> Iterator[Log]:
    from harness.tracking import RunLog, start_mirrors

    log = RunLog(folder)
    mirrors = start_mirrors(folder, wandb="offline")
    yield lambda step, values: log.write("step", values, step=step)
    log.close()
    mirrors.close(120)


@contextlib.contextmanager
def summary_writer(folder: str) -> Iterator[Log]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder)

    def log(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    yield log
    writer.close()


@contextlib.contextmanager
def wandb_offline(folder: str) -> Iterator[Log]:
    import wandb

    run = wandb.init(mode="offline", dir=folder, project="bench", settings=wandb.Settings(silent=True))
    yield lambda step, values: run.log(values, step=step)
    run.finish()


@contextlib.contextmanager
def trackio(folder: str) -> Iterator[Log]:
    os.environ["TRACKIO_DIR"] = folder
    import trackio

    run = trackio.init(project="bench", embed=False)
    yield lambda step, values: run.log(values, step=step)
    run.finish()


@contextlib.contextmanager
def mlflow_sqlite(folder: str) -> Iterator[Log]:
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    with mlflow.start_run():
        yield lambda step, values: mlflow.log_metrics(values, step=step)


TRACKERS = dict(zip(METHODS, (harness, summary_writer, wandb_offline, trackio, mlflow_sqlite), strict=True))


def measure(method: str, num_values: int, num_steps: int) -> dict[str, list[float]]:
    """Seconds blocked of each step, with other work between the steps and back to back, and the processor
    seconds per step: those of the call and those of background threads."""
    values = {f"metric/{i}": random.random() for i in range(num_values)}
    times: dict[str, list[float]] = {"paused": [], "back_to_back": [], "cpu": []}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, TRACKERS[method](folder) as log:
        for step in range(WARM_UP):
            log(step, values)
        others_before = time.process_time() - time.thread_time()
        for step in range(WARM_UP, WARM_UP + num_steps):
            began, cpu_began = time.perf_counter(), time.thread_time()
            log(step, values)
            times["paused"].append(time.perf_counter() - began)
            times["cpu"].append(time.thread_time() - cpu_began)
            while time.perf_counter() - began < PAUSE_S:
                pass
        others = (time.process_time() - time.thread_time() - others_before) / num_steps
        times["cpu"] = [statistics.mean(times["cpu"]) + others]
        for step in range(WARM_UP + num_steps, WARM_UP + 2 * num_steps):
            began = time.perf_counter()
            log(step, values)
            times["back_to_back"].append(time.perf_counter() - began)
    return times


def measure_apart(python: str, method: str, num_values: int, num_steps: int) -> dict[str, list[float]] | None:
    """As `measure`, in a process of `python`; None if it has not the tracker."""
    if method in NEEDS and importlib.util.find_spec(NEEDS[method]) is None:
        probe = [python, "-c", f"import {NEEDS[method]}"]
        if subprocess.run(probe, capture_output=True, check=False).returncode:
            return None
    else:
        python = sys.executable
    command = [python, __file__, "--measure", method, str(num_values), str(num_steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{method} failed:\n{done.stderr}")
    result: dict[str, list[float]] = json.loads(
        next(line for line in done.stdout.splitlines() if line.startswith('{"paused"'))
    )
    return result


def training_throughput(num_pairs: int) -> dict[str, Any]:
    """Steps per second with everything on, as a share of that with no tracking; see the top of the file."""
    train = _small_training()
    train(WARM_UP_S, None)
    untracked: list[float] = []
    tracked: list[float] = []
    side_cpu_s: list[float] = []
    others: list[float] = []
    behind: list[int] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, _Tracked(Path(folder)) as run:
        for pair in range(num_pairs + 1):
            run.catch_up()
            with run.stopped(), _Others(run, others):
                untracked.append(train(BLOCK_S, None))
            if pair == num_pairs:
                break
            train(WARM_UP_S, run.write)  # the mirrors are in their stride when the block begins
            before = run.cpu_s()
            with _Others(run, others):
                tracked.append(train(BLOCK_S, run.write))
            side_cpu_s.append((run.cpu_s() - before) / (BLOCK_S / tracked[-1]))
            behind.append(run.num_written - run.num_mirrored())
    around = [(a + b) / 2 for a, b in itertools.pairwise(untracked)]
    ratios = [a / b for a, b in zip(around, tracked, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "step (ms)": 1e3 * statistics.median(untracked),
        "step, tracked (ms)": 1e3 * statistics.median(tracked),
        "throughput against untracked": middle,
        "throughput, quartiles": f"{low:.3f} to {high:.3f}",
        "CPU of the side process per step (ms)": 1e3 * statistics.median(side_cpu_s),
        "steps not yet in all mirrors": statistics.median(behind),
        "cores in use by others": statistics.median(others),
    }


def _small_training() -> Callable[[float, Write | None], float]:
    """A function that trains for some seconds on all cores, and returns the seconds per step."""
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(512, 2048), torch.nn.GELU(), torch.nn.Linear(2048, 512))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batch = torch.randn(512, 512)

    def train(seconds: float, write: Write | None) -> float:
        began, num_steps = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            loss = (model(batch) - batch).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            value = loss.item()
            if write is not None:
                write(value)
            num_steps += 1
        return (time.perf_counter() - began) / num_steps

    return train


class _Tracked:
    """A run with all mirrors, whose helper processes can be stopped."""

    def __init__(self, run_dir: Path) -> None:
        from harness.tracking import RunLog, start_mirrors

        self._run_dir = run_dir
        self._log = RunLog(run_dir)
        self._mirrors = start_mirrors(run_dir, wandb="offline")
        self.num_written = 0
        self.write(1.0)

    def __enter__(self) -> _Tracked:
        return self

    def __exit__(self, *_: object) -> None:
        self._log.close()
        self._mirrors.close(120)

    def write(self, loss: float) -> None:
        self._log.write("step", {f"metric/{i}": loss for i in range(20)}, step=self.num_written)
        self.num_written += 1

    def catch_up(self, timeout_s: float = 120.0) -> None:
        """Waits until all mirrors have everything. The first time, until they are there at all."""
        deadline = time.monotonic() + timeout_s
        while self.num_mirrored() < self.num_written and time.monotonic() < deadline:
            time.sleep(0.2)

    def num_mirrored(self) -> int:
        """Steps that all mirrors have taken and kept."""
        return min(self._num_kept(name) for name in ("tensorboard", "wandb"))

    def _num_kept(self, mirror: str) -> int:
        try:
            state = json.loads((self._run_dir / "log" / "mirrors" / f"{mirror}.json").read_text())
        except OSError:  # none yet
            return 0
        place = state["positions"]["."]
        with (self._run_dir / "log" / f"{place['segment']:08d}.jsonl").open("rb") as file:
            return file.read(place["offset"]).count(b'"kind":"step"')

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Without the helper processes, as if there were none."""
        helpers = self._helpers()
        for helper in helpers:
            helper.suspend()
        yield
        for helper in helpers:
            helper.resume()

    def cpu_s(self) -> float:
        """Processor seconds of the side process and wandb's."""
        return sum(sum(each.cpu_times()[:2]) for each in self._helpers())

    def _helpers(self) -> list[psutil.Process]:
        side = psutil.Process(self._mirrors.pid)
        return [side, *side.children(recursive=True)]


class _Others:
    """Adds to a list how many cores processes that are not this run's used in the meantime."""

    def __init__(self, run: _Tracked, found: list[float]) -> None:
        self._run, self._found = run, found

    def __enter__(self) -> None:
        self._before, self._began = self._cpu_s(), time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._found.append((self._cpu_s() - self._before) / (time.perf_counter() - self._began))

    def _cpu_s(self) -> float:
        of_cores = psutil.cpu_times(percpu=True)
        used = sum(sum(of_cores[core][:3]) for core in os.sched_getaffinity(0))
        return used - time.process_time() - self._run.cpu_s()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--also-python", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--only-throughput", action="store_true")
    parser.add_argument("--pairs", type=int, default=NUM_PAIRS, help="tracked blocks of the last figure")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        method, num_values, num_steps = arguments.measure
        print(json.dumps(measure(method, int(num_values), int(num_steps))))
        return
    import torch
    from results import summarise, write_results

    cpu = torch.device("cpu")
    throughput = {"training with everything on": training_throughput(arguments.pairs)}
    write_results("tracking-throughput", throughput, device=cpu, about={"pairs": arguments.pairs})
    if arguments.only_throughput:
        return
    microseconds: dict[str, dict[str, list[float]]] = {}
    for _ in range(arguments.rounds):
        for size in SIZES:
            for method in METHODS:
                result = measure_apart(arguments.also_python, method, size, arguments.steps)
                row = microseconds.setdefault(f"{method}, {size} values", {})
                for name, seconds in (result or {}).items():
                    row.setdefault(name, []).extend(1e6 * s for s in seconds)
    rows: dict[str, dict[str, Any]] = {
        name: {
            "blocked, back to back (us)": summarise(row["back_to_back"]),
            "blocked, 2 ms of other work between (us)": summarise(row["paused"]),
            "CPU per step (us)": statistics.median(row["cpu"]),
        }
        for name, row in sorted(microseconds.items(), key=lambda item: item[0].rsplit(" ", 2)[1])
        if row
    }
    about = {"steps": arguments.steps, "rounds": arguments.rounds}
    write_results("tracking", rows, device=cpu, about=about)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
