"""What it takes to look at a long run: seconds and memory of every command that reads one.

    python scripts/bench_reading.py [--steps 1000000] [--folder FOLDER]

Makes two runs of the same steps that part in the middle, as a training of a small model on two ranks writes
them: 20 metrics a step, statistics of the ranks every step, evaluations, checkpoints, samples of the node,
and a rollback. Then each command is run in a process of its own; reported are its wall time and the largest
size of its memory (peak resident set). FOLDER keeps the runs for the next time. Writes
docs/benchmarks/reading.json and .md.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from harness.runlog.codec import encode
from harness.runlog.events import Checkpoint, Incident, Rollback
from harness.runlog.names import Metric
from harness.runlog.nodes import NO_ATTEMPT
from harness.runlog.paths import log_dir, nodes_dir
from harness.runlog.process import identity
from harness.runlog.segments import SegmentWriter

STEPS_PER_SAMPLE, STEPS_PER_EVAL, STEPS_PER_CHECKPOINT = 100, 1000, 10_000
STEP_S = 0.1
PLAIN = [
    *(Metric.TRAIN_LOSS, Metric.TRAIN_PERPLEXITY, Metric.TRAIN_ACCURACY, Metric.GRAD_NORM),
    *(Metric.GRAD_NORM_CLIPPED, Metric.CLIP_COEF, Metric.LR, Metric.TOKENS, Metric.NUM_NAN, Metric.NUM_INF),
    *(Metric.NUM_ZERO, Metric.MAX_ABS, Metric.SKIPS, Metric.CLIP_FRAC, Metric.LOSS_SCALE, Metric.SPIKE_SCORE),
    *(Metric.STEP_S, Metric.DATA_WAIT_S, Metric.COMPUTE_S, Metric.TOKENS_PER_S),
]
COUNTS = {Metric.NUM_NAN, Metric.NUM_INF, Metric.NUM_ZERO, Metric.SKIPS}


class _Writer:
    """A run's log, written with times of its own instead of the clock's."""

    def __init__(self, run_dir: Path, num_steps: int) -> None:
        self._log = SegmentWriter(log_dir(run_dir))
        self._node = SegmentWriter(nodes_dir(run_dir) / "bench-00000000")
        self._began = time.time() - num_steps * STEP_S
        self._now = self._began
        self.attempt = 0

    def tick(self, step: int) -> None:
        self._now = self._began + step * STEP_S

    def write(self, kind: str, values: dict[str, Any], step: int | None = None) -> None:
        self._log.append(encode(kind, values, attempt=self.attempt, step=step, time=self._now))

    def sample(self) -> None:
        values = {Metric.CPU_FRAC: 0.5, Metric.RAM_USED_GB: 10.0, Metric.PROCESS_RAM_GB: 1.0}
        self._node.append(encode("system", values, attempt=NO_ATTEMPT, step=None, time=self._now))

    def close(self) -> None:
        self.write("end", {"state": "finished"})
        self._log.close()
        self._node.close()


def make_run(run_dir: Path, num_steps: int, *, parts_at: int) -> None:
    """A run whose loss differs from that of another one from step `parts_at` on."""
    rng, log = np.random.default_rng(0), _Writer(run_dir, num_steps)
    config = {"loop": {"steps": num_steps}, "name": run_dir.name}
    log.write("run", {**identity(), "config": config, "world_size": 2})
    back_at, back_to = num_steps // 2, num_steps // 2 - num_steps // 100
    for first, last in ((0, back_at), (back_to, num_steps)):
        if first:
            log.attempt += 1
            log.write("rewind", {"step": first})
            log.write("event", Rollback(failed_step=last, reason="spike").to_values(), first)
        for begin in range(first, last, 10_000):
            _write_steps(log, rng, range(begin, min(last, begin + 10_000)), parts_at)
    log.close()


def _write_steps(log: _Writer, rng: np.random.Generator, steps: range, parts_at: int) -> None:
    rows = (2 + rng.standard_normal((len(steps), len(PLAIN))) / 10).tolist()
    for step, row in zip(steps, rows, strict=True):
        log.tick(step)
        values = dict(zip(PLAIN, row, strict=True))
        values |= dict.fromkeys(COUNTS, 0)
        values[Metric.TRAIN_LOSS] = 10 / (1 + step) ** 0.1 + row[0] / 100 + (step >= parts_at) * 1e-9
        log.write("step", values, step)
        log.write("ranks", {"loss": row[:2], "grad_norm": row[2:4], "compute_s": row[4:6]}, step)
        if step % STEPS_PER_SAMPLE == 0:
            log.sample()
        if step % STEPS_PER_EVAL == 0:
            log.write("eval", {Metric.VAL_LOSS: values[Metric.TRAIN_LOSS] + 0.1}, step)
            log.write("layers", {"grad_norm": {f"layer {n}": x for n, x in enumerate(row)}}, step)
        if step % STEPS_PER_CHECKPOINT == STEPS_PER_CHECKPOINT - 1:
            log.write("event", Checkpoint(num_steps=step + 1, seconds=1.0).to_values(), step)
            log.write("event", Incident(kind="spike", rank=0, reason="spike").to_values(), step)
