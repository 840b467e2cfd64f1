"""Tokens per second of the quickstart under `accelerate launch`: one thread, and the process's share.

    python scripts/bench_threads.py [--pairs 3] [--steps 40]

accelerate sets OMP_NUM_THREADS to 1 for each process; `parallel.threads` is the process's share of the cores
where nothing else is said. The two take turns; the figure of a run is its own summary's, the ratio the median
over the pairs. Results: docs/benchmarks/threads.*.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
from results import summarise, write_results

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    one, share = [], []
    with tempfile.TemporaryDirectory() as folder:
        for pair in range(options.pairs):
            one.append(tokens_per_s(Path(folder), f"one{pair}", options.steps, "--parallel.threads=1"))
            share.append(tokens_per_s(Path(folder), f"share{pair}", options.steps))
    ratio = median(b / a for a, b in zip(one, share, strict=True))
    rows = {
        "one thread": {"tokens_per_s": summarise(one)},
        "its share of the cores": {"tokens_per_s": summarise(share), "over_one_thread": ratio},
    }
    about = {"processes": 1, "steps": options.steps, "pairs": options.pairs}
    write_results("threads", rows, device=torch.device("cpu"), about=about)


def tokens_per_s(folder: Path, name: str, steps: int, *settings: str) -> float:
    """Runs the quickstart as the README does, and reads what its summary says."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1"]
    settings = (f"--runs_dir={folder}", f"--name={name}", f"--loop.steps={steps}", *settings)
    subprocess.run([*launch, str(ROOT / "harness" / "train.py"), *settings], check=True, cwd=ROOT)
    return float(json.loads((folder / name / "summary.json").read_text())["tokens_per_s"])


if __name__ == "__main__":
    main()
