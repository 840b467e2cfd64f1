"""Lets 40 runs go wrong, each for a cause of its own, and asks whether the replay names whose fault it was.

    python scripts/trial_causes.py [NAME ...]

Two gloo ranks under DDP: operations that leave output unwritten with some probability (in plain torch, or
within an operator of `torch.library`, forward or backward), operations that race, a NaN in the backward pass
of fused attention, bad samples, learning rates that are too high, and flipped bits in a parameter, a moment,
an activation. What hardware did is not done again in the replay. A case is right if the story's class is the
cause's. Writes docs/benchmarks/causes.md; with names only those are tried, and nothing is written.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from results import write_results  # noqa: E402  (the repository has to be on the path first)

from tests.support.causes import CASES, first_incident, replayed, train_causes  # noqa: E402
from tests.support.distributed import run_ranks  # noqa: E402

WORLD_SIZE = 2
AT_ONCE = 8
"""Runs in one set of processes."""
WANTED = 38


def main(names: list[str]) -> int:
    """1 if fewer than 38 of the 40 are right."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    wanted = names or list(CASES)
    rows: dict[str, dict[str, object]] = {}
    for first in range(0, len(wanted), AT_ONCE):
        rows |= _rows(wanted[first : first + AT_ONCE])
        right = sum(row["right"] == "yes" for row in rows.values())
        print(f"{right} of {len(rows)}", flush=True)
        if not names:  # what there is so far: a trial that is cut keeps it
            about = {"ranks": WORLD_SIZE, "right": f"{right} of {len(rows)}"}
            write_results("causes", rows, device=torch.device("cpu"), about=about)
    return int(right < WANTED and not names)


def _rows(names: list[str]) -> dict[str, dict[str, object]]:
    with tempfile.TemporaryDirectory(prefix="causes-") as folder:
        run_ranks(train_causes, WORLD_SIZE, folder, names, timeout_s=1800.0)
        return {name: _row(Path(folder) / name / "runs" / "own", name) for name in names}


def _row(directory: Path, name: str) -> dict[str, object]:
    case = CASES[name]
    row: dict[str, object] = {"what": _what(name), "truth": case.truth}
    if first_incident(directory) is None:
        return {**row, "right": "no", "why": "there was no incident"}
    started = time.perf_counter()
    found = replayed(directory, name)
    seconds = round(time.perf_counter() - started, 1)
    judgement = found.judgement
    named = judgement.kind if judgement is not None else "nothing"
    row |= {"step": found.history.step, "named": named, "right": "yes" if named == case.truth else "no"}
    row |= {"reproduced": "yes" if found.reproduced else "no", "replay, s": seconds}
    row |= {"why": "" if judgement is None else f"{judgement.sure}: {judgement.why}"}
    print(name, row, flush=True)
    return row


def _what(name: str) -> str:
    case = CASES[name]
    values = [f"{key} {value}" for key, value in case.values.items()]
    return ", ".join([*values, *(one.removeprefix("--") for one in case.settings)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
