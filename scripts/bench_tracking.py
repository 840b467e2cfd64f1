"""How long one step's log holds up the training thread, by tracker, and what tracking costs a training.

    python scripts/bench_tracking.py [--steps 1000] [--rounds 3] [--also-python PYTHON]

Each measurement is a process of its own that logs steps of 10 or 300 floats, back to back and with 2 ms of
other work between; the trackers take turns. `blocked` is the time until the call returns, `CPU` the processor
time of the whole process per step, background threads included. trackio and
MLflow (on SQLite) are left out where they are not installed; PYTHON may be an interpreter that has them.
`torch` SummaryWriter and W&B (offline) are measured with their defaults, the harness with its side process
mirroring to TensorBoard and W&B.

The last figure trains a small network on all cores in turns without and with all mirrors, samples and alerts.
Writes docs/benchmarks/tracking.json and .md.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
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

Log = Callable[[int, dict[str, float]], None]
METHODS = ("harness", "SummaryWriter", "W&B offline", "trackio", "MLflow SQLite")
NEEDS = {"trackio": "trackio", "MLflow SQLite": "mlflow"}
SIZES = (10, 300)
PAUSE_S = 0.002
WARM_UP = 20
NUM_BLOCKS, BLOCK_STEPS = 12, 60


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


def training_throughput() -> dict[str, float]:
    """Steps per second with everything on, as a share of that with no tracking; blocks take turns."""
    import torch

    from harness.tracking import RunLog, start_mirrors

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(512, 2048), torch.nn.GELU(), torch.nn.Linear(2048, 512))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batch = torch.randn(512, 512)

    def train(num_steps: int, log: Callable[[int, float], None]) -> float:
        began = time.perf_counter()
        for step in range(num_steps):
            loss = (model(batch) - batch).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            log(step, loss.item())
        return (time.perf_counter() - began) / num_steps

    seconds: dict[str, list[float]] = {"off": [], "on": []}
    side_cpu_s: list[float] = []
    train(BLOCK_STEPS, lambda step, loss: None)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for block in range(NUM_BLOCKS):
            seconds["off"].append(train(BLOCK_STEPS, lambda step, loss: None))
            run_dir = Path(folder, str(block))
            log = RunLog(run_dir)
            mirrors = start_mirrors(run_dir, wandb="offline")
            _wait_until_started(run_dir)

            def write(step: int, loss: float, log: RunLog = log) -> None:
                log.write("step", {f"metric/{i}": loss for i in range(20)}, step=step)

            cpu_before = _side_cpu_s(mirrors.pid)
            seconds["on"].append(train(BLOCK_STEPS, write))
            time.sleep(2.0)  # what was written last is mirrored too
            side_cpu_s.append((_side_cpu_s(mirrors.pid) - cpu_before) / BLOCK_STEPS)
            log.close()
            mirrors.close(60)
    off, on = (statistics.median(seconds[which]) for which in ("off", "on"))
    ratios = [a / b for a, b in zip(seconds["off"], seconds["on"], strict=True)]
    return {
        "step (ms)": 1e3 * off,
        "step, tracked (ms)": 1e3 * on,
        "throughput against untracked": statistics.median(ratios),
        "CPU of the side process per step (ms)": 1e3 * statistics.median(side_cpu_s),
    }


def _side_cpu_s(pid: int | None) -> float:
    """Processor seconds of the side process and wandb's."""
    import psutil

    side = psutil.Process(pid)
    return sum(sum(each.cpu_times()[:2]) for each in (side, *side.children(recursive=True)))


def _wait_until_started(run_dir: Path) -> None:
    """Side process and wandb start once in a run, not every few seconds as here."""
    while not list(run_dir.glob("wandb/offline-run-*/*.wandb")):
        time.sleep(0.1)
    time.sleep(3.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--also-python", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        method, num_values, num_steps = arguments.measure
        print(json.dumps(measure(method, int(num_values), int(num_steps))))
        return
    import torch
    from results import summarise, write_results

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
    rows["training with everything on"] = dict(training_throughput())
    about = {"steps": arguments.steps, "rounds": arguments.rounds}
    write_results("tracking", rows, device=torch.device("cpu"), about=about)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
