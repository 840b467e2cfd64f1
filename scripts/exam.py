"""Somebody else's exam: the faults that lm-resiliency's fault kit can inject into the main program.

    pip install -e '.[exam]'
    python scripts/exam.py [PART_OF_A_NAME ...]

Three gloo ranks under DDP, a run for each type, surface and magnitude that the kit's local executor supports
(`tests/support/exam.py` says how), with everything compared in every step: state, replicas, and each step
computed twice. Writes docs/benchmarks/exam.md; with parts of names only those cells are tried, and nothing is
written.
"""

from __future__ import annotations

import importlib.metadata
import logging
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from results import write_results  # noqa: E402  (the repository has to be on the path first)

from tests.support.distributed import run_ranks  # noqa: E402
from tests.support.exam import CLEAN, Cell, Outcome, all_cells, judge, train_cells  # noqa: E402

WORLD_SIZE = 3
AT_ONCE = 39
"""Runs in one set of processes."""
WANTED = 0.95


def main(parts: Sequence[str]) -> int:
    """1 if too little was detected of what changes training, or a wrong rank was named."""
    logging.disable(logging.WARNING)
    cells = [cell for cell in all_cells() if not parts or any(part in cell.name for part in parts)]
    found: dict[Cell, Outcome] = {}
    for first in range(0, len(cells), AT_ONCE):
        found |= _outcomes(cells[first : first + AT_ONCE])
        print(f"{len(found)} of {len(cells)}", flush=True)
        if not parts:
            _write(found)
    detected, right, counted = _counted(found)
    return int(len(detected) < WANTED * len(counted) or len(right) < len(detected))


def _counted(found: Mapping[Cell, Outcome]) -> tuple[list[Outcome], list[Outcome], list[Outcome]]:
    """Those detected, those of them with the right rank, and those that change training."""
    counted = [one for one in found.values() if one.was_injected and one.changes]
    detected = [one for one in counted if one.is_detected]
    right = [one for one in detected if one.is_right_rank]
    return detected, right, counted


def _write(found: Mapping[Cell, Outcome]) -> None:
    """What there is so far: a trial that is cut keeps it."""
    detected, right, counted = _counted(found)
    summary = {
        "cells": len(found),
        "change training": len(counted),
        "of these detected": len(detected),
        "of these right rank": len(right),
    }
    rows = {cell.name: _row(outcome) for cell, outcome in found.items()}
    about = {"lm-resiliency": importlib.metadata.version("lm-resiliency"), "ranks": WORLD_SIZE, **summary}
    write_results("exam", rows, device=torch.device("cpu"), about=about)


def _outcomes(cells: Sequence[Cell]) -> dict[Cell, Outcome]:
    runs = [CLEAN, *cells]
    with tempfile.TemporaryDirectory(prefix="exam-") as folder:
        of_cells = list(zip(*run_ranks(train_cells, WORLD_SIZE, folder, runs, timeout_s=1800.0), strict=True))
        return {
            cell: judge(folder, number, of_cells[number], of_cells[0])
            for number, cell in enumerate(runs)
            if cell != CLEAN
        }


def _row(outcome: Outcome) -> dict[str, object]:
    if not outcome.was_injected:
        return {"injected": "no", "what was said, or why not": outcome.problem or "the kit did nothing"}
    return {
        "injected": "yes",
        "changes training": "yes" if outcome.changes else "no",
        "detected": "yes" if outcome.is_detected else "no",
        "right rank": ("yes" if outcome.is_right_rank else "no") if outcome.is_detected else "",
        "end state exact": "no" if outcome.changes else "yes",
        "what was said, or why not": outcome.by[0] if outcome.by else outcome.problem,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
