"""What Python's cyclic garbage collector takes of the steps: at moments of its own, and at set ones.

    python scripts/bench_garbage.py [--steps 400]

A small run of one process, whose objects are mostly those of the imported libraries, as in a large one. The
time is that of the training thread's processor, so that other programs do not count. The results go to
docs/benchmarks/garbage.*.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from results import write_results  # noqa: E402  (the repository has to be on the path first)

from harness.training import Callback, train  # noqa: E402
from tests.support.runs import tiny_config  # noqa: E402

NUM_FIRST = 10
"""Steps that do not count."""


class Pauses(Callback):
    """How long the collector took, each time, after the first steps."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step(self, run: Any, record: Any) -> None:
        if record.step == NUM_FIRST:
            gc.callbacks.append(self._note)

    def on_end(self, run: Any, status: str) -> None:
        gc.callbacks.remove(self._note)

    def _note(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._began = time.thread_time()
        else:
            self.seconds.append(time.thread_time() - self._began)


def pauses(every: int, steps: int) -> dict[str, object]:
    """The pauses of a run that collects after `every` steps."""
    with tempfile.TemporaryDirectory() as name:
        config = tiny_config(
            Path(name), f"--loop.steps={steps}", f"--loop.gc_every={every}", "--loop.eval_every=0"
        )
        noted = Pauses()
        train(config, callbacks=[noted])
    ms = [1000 * seconds for seconds in noted.seconds]
    return {
        "collections": len(ms),
        "ms per step": sum(ms) / (steps - NUM_FIRST),
        "longest ms": max(ms, default=0.0),
    }


def full_collection() -> dict[str, object]:
    """What Python takes each time when it looks through everything, which happens seldom."""
    gc.collect()
    began = time.thread_time()
    gc.collect()
    return {"collections": 1, "longest ms": 1000 * (time.thread_time() - began)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    rows = {
        "Python's own moments (loop.gc_every 0)": pauses(0, options.steps),
        **{f"loop.gc_every {every}": pauses(every, options.steps) for every in (10, 50, 200)},
        "one full collection, with nothing set aside": full_collection(),
    }
    write_results("garbage", rows, device=torch.device("cpu"), about={"steps": options.steps})


if __name__ == "__main__":
    main()
