"""How long a save blocks training and how long it takes: torch.save, DCP, DCP asynchronous, the harness.

    python scripts/bench_checkpoint.py [--gigabytes 0.2 1 3] [--rounds 3] [--saves 4]

The state is a model with Adam's moments, on the CPU. Each measurement is a process of its own that saves a
few times and flushes to the disk; the methods take turns, so that a noisy disk is noisy for all. The first
save of a process, which also makes its staging memory, is given apart. `peak` is memory beyond the state's.
The figures go to docs/benchmarks/checkpoint.*.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from results import write_results
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict

from harness.checkpoint import Checkpointer

State = dict[str, Any]
Save = Callable[[int], Callable[[], object]]
"""Begins the save of a step and gives what waits for its end."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.2, 1.0, 3.0])
    parser.add_argument("--rounds", type=int, default=3, help="processes per method and size")
    parser.add_argument("--saves", type=int, default=4, help="saves per process, the first one included")
    parser.add_argument("--folder", default=None, help="where to write; default: the temporary folder")
    parser.add_argument("--measure", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.gigabytes[0], options.saves, options.folder)))
        return
    rows = {}
    for size in options.gigabytes:
        seen: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
        for _ in range(options.rounds):
            for method, runs in seen.items():
                runs.append(in_a_process(method, size, options.saves, options.folder))
        for method, runs in seen.items():
            rows[f"{size:g} GB, {method}"] = row(runs, seen["DCP"])
    about = {"rounds": options.rounds, "saves": options.saves}
    write_results("checkpoint", rows, device=torch.device("cpu"), about=about)


def in_a_process(method: str, size: float, saves: int, folder: str | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=folder) as here:
        command = [sys.executable, __file__, "--measure", method, "--gigabytes", str(size)]
        command += ["--saves", str(saves), "--folder", here]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seen: dict[str, Any] = json.loads(output.splitlines()[-1])
    return seen


def row(runs: list[dict[str, Any]], sync: list[dict[str, Any]]) -> Mapping[str, Any]:
    def median(name: str, of: list[dict[str, Any]]) -> float:
        return statistics.median(value for run in of for value in run[name])

    total_s = median("total_s", runs)
    return {
        "blocked s": median("blocked_s", runs),
        "blocked / DCP's": median("blocked_s", runs) / median("blocked_s", sync),
        "first blocked s": median("first_blocked_s", runs),
        "total s": total_s,
        "MB/s": runs[0]["size_bytes"] / total_s / 1e6,
        "throughput / DCP's": median("total_s", sync) / total_s,
        "bytes": runs[0]["size_bytes"],
        "peak MB": median("peak_mb", runs),
    }


def measure(method: str, size: float, saves: int, folder: str) -> dict[str, Any]:
    """Saves a state of `size` gigabytes a few times; blocked and total seconds of all but the first."""
    torch.set_num_threads(2)
    state = make_state(size)
    before_mb = forget_peak_mb()
    blocked_s, total_s, size_bytes = [], [], 0
    with METHODS[method](state, Path(folder)) as save:
        for step in range(saves):
            start = time.perf_counter()
            wait = save(step)
            blocked_s.append(time.perf_counter() - start)
            wait()
            total_s.append(time.perf_counter() - start)
            size_bytes = clear(Path(folder))
    return {
        "blocked_s": blocked_s[1:],
        "total_s": total_s[1:],
        "first_blocked_s": blocked_s[:1],
        "size_bytes": size_bytes,
        "peak_mb": [peak_mb() - before_mb],
    }


def forget_peak_mb() -> float:
    """Sets the peak of this process's memory back to what it is now (Linux), and gives that."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_mb()


def peak_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def make_state(size: float) -> State:
    """A stack of square layers and AdamW after one step: 12 bytes a parameter."""
    width = 1024
    num_layers = max(1, round(size * 1e9 / 12 / width**2))
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(num_layers)))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    optimizer.zero_grad()
    return {"model": model, "optimizer": optimizer}


def plain(state: State) -> State:
    model, optimizer = get_state_dict(state["model"], state["optimizer"])
    return {"model": model, "optimizer": optimizer}


@contextlib.contextmanager
def torch_save(state: State, folder: Path) -> Any:
    def save(step: int) -> Callable[[], object]:
        with open(folder / f"{step}.pt", "wb") as file:
            torch.save(plain(state), file)
            file.flush()
            os.fsync(file.fileno())
        return lambda: None

    yield save


@contextlib.contextmanager
def one_rank() -> Any:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def dcp_sync(state: State, folder: Path) -> Any:
    def save(step: int) -> Callable[[], object]:
        dcp.save(plain(state), storage_writer=dcp.FileSystemWriter(folder / str(step)))
        return lambda: None

    with one_rank():
        yield save


@contextlib.contextmanager
def dcp_async(state: State, folder: Path) -> Any:
    # One stager for all saves, which keeps its memory, and a copy that is complete when the call returns.
    options = StagingOptions(
        use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
    )
    stager = DefaultStager(options)

    def save(step: int) -> Callable[[], object]:
        writer = dcp.FileSystemWriter(folder / str(step))
        future = dcp.async_save(plain(state), storage_writer=writer, async_stager=stager)
        return future.result

    with one_rank():
        yield save


@contextlib.contextmanager
def harness(state: State, folder: Path) -> Any:
    with one_rank(), Checkpointer(folder) as checkpointer:

        def save(step: int) -> Callable[[], object]:
            checkpointer.save(step, state)
            return checkpointer.wait

        yield save


METHODS = {"torch.save": torch_save, "DCP": dcp_sync, "DCP asynchronous": dcp_async, "harness": harness}


def clear(folder: Path) -> int:
    """Removes what was written, outside the measured time; gives its size."""
    size_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    os.sync()
    return size_bytes


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    main()
