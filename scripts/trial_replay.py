"""Replays every kind of fault and asks whether the replay names it.

    python scripts/trial_replay.py

Two gloo ranks under DDP and FSDP2, in fp32 and bf16 (DDP in fp16 too): NaN and Inf in a gradient, an
activation, the loss and the input of each rank; and tasks that go bad at certain samples by an operation of
their own. A cell is right if the replay reproduces the step (verdict, counts, parameters) and names rank,
micro-batch, module, operation, direction and, where the data is to blame, exactly the samples. Writes
docs/benchmarks/replay.md.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from results import write_results  # noqa: E402  (the repository has to be on the path first)

from tests.support.broken_tasks import EXPECTED  # noqa: E402
from tests.support.distributed import run_ranks  # noqa: E402
from tests.support.replayed import Found, check_fault, check_task, faults, train_faults, train_task  # noqa: E402

WORLD_SIZE = 2
MOST_S = 120.0
RUNS = (("ddp", "fp32"), ("ddp", "bf16"), ("ddp", "fp16"), ("fsdp", "fp32"), ("fsdp", "bf16"))


def main() -> int:
    """1 if a cell is wrong or took too long."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows: dict[str, dict[str, object]] = {}
    wrong: dict[str, dict[str, object]] = {}
    for strategy, precision in RUNS:
        found = _faults(strategy, precision)
        _take(f"faults, {strategy}, {precision}", found, rows, wrong)
    for precision in ("fp32", "bf16"):
        found = {f"{name}": _task(name, precision) for name in (*EXPECTED, "poisoned")}
        _take(f"operations, ddp, {precision}", found, rows, wrong)
    about = {"ranks": WORLD_SIZE}
    sections = {"Wrong": wrong} if wrong else None
    write_results("replay", rows, device=torch.device("cpu"), about=about, sections=sections)
    return int(bool(wrong))


def _faults(strategy: str, precision: str) -> dict[str, Found]:
    struck = faults()
    with tempfile.TemporaryDirectory(prefix="replay-") as folder:
        run_ranks(train_faults, WORLD_SIZE, folder, strategy, precision, struck, timeout_s=300.0)
        directory = Path(folder) / "runs" / "own"
        return {
            f"{one.kind} in {one.target} of rank {one.rank}": check_fault(directory, one) for one in struck
        }


def _task(name: str, precision: str) -> Found:
    with tempfile.TemporaryDirectory(prefix="replay-") as folder:
        run_ranks(train_task, WORLD_SIZE, folder, name, precision, timeout_s=300.0)
        return check_task(Path(folder) / "runs" / "own", name)


def _take(
    name: str,
    found: dict[str, Found],
    rows: dict[str, dict[str, object]],
    wrong: dict[str, dict[str, object]],
) -> None:
    right = [one for one in found.values() if not one.problems and one.seconds < MOST_S]
    rows[name] = {
        "cells": len(found),
        "right": len(right),
        "slowest replay, s": round(max(one.seconds for one in found.values()), 1),
    }
    print(name, rows[name], flush=True)
    for cell, one in found.items():
        if one.problems or one.seconds >= MOST_S:
            wrong[f"{name}: {cell}"] = {"what": "; ".join(one.problems) or f"{one.seconds:.0f} s"}
            print(cell, one, flush=True)


if __name__ == "__main__":
    sys.exit(main())
