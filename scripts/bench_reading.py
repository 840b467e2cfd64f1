"""What it takes to look at a long run: seconds and memory of every command that reads one.

    python scripts/bench_reading.py [--steps 1000000] [--folder FOLDER]

Makes two runs of the same steps that part in the middle, as a training of a small model on two ranks writes
them: 20 metrics a step, statistics of the ranks every step, evaluations, checkpoints, samples of the node,
and a rollback. Then each command is run in a process of its own; reported are its wall time and the largest
size of its memory (peak resident set). FOLDER keeps the runs for the next time. Writes
docs/benchmarks/reading.json and .md.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from bench_dashboard import Dashboard, wait_for

from harness.runlog.codec import encode
from harness.runlog.events import Checkpoint, Incident, Rollback
from harness.runlog.names import Metric
from harness.runlog.nodes import NO_ATTEMPT
from harness.runlog.paths import log_dir, nodes_dir
from harness.runlog.process import identity
from harness.runlog.segments import SegmentWriter

ROOT = Path(__file__).parents[1]
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


def commands(folder: Path, out: Path) -> dict[str, list[str]]:
    """What people type, and the picture that a training draws at its end."""
    a, b = str(folder / "a"), str(folder / "b")
    return {
        "harness show": ["show", a],
        "harness watch --once": ["watch", "--once", a],
        "harness compare": ["compare", a, b],
        "harness report": ["report", a, "-o", str(out / "report.html")],
        "harness export csv": ["export-metrics", a, str(out / "a.csv")],
        "picture": ["picture", a, str(out / "curves.png")],
        "ExperimentTracker's resume": ["last-step", a],
    }


def run_one(arguments: list[str]) -> None:
    """One command, in this process."""
    what, *paths = arguments
    if what == "picture":
        from harness.tracking import plot_run

        plot_run(paths[0], paths[1])
    elif what == "export-metrics":
        from harness.tracking.export import export_run

        export_run(paths[0], paths[1])
    elif what == "last-step":
        from harness.tracking import Run

        assert Run(paths[0]).last_step
    else:
        from harness.cli.main import main

        sys.argv = ["harness", *arguments]
        with contextlib.redirect_stdout(open(os.devnull, "w")):
            main()


def measured(arguments: list[str]) -> dict[str, float]:
    """Wall time, processor time and largest memory of a process that runs it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, __file__, "--one", *arguments], env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{arguments} ended with {process.returncode}")
    return {
        "seconds": time.perf_counter() - began,
        "processor (s)": usage.ru_utime + usage.ru_stime,
        "memory (MB)": usage.ru_maxrss / 1e3,
    }


def dashboards_first_answer(folder: Path) -> dict[str, dict[str, float]]:
    """From a start that has never seen the runs: the first answer, a sample, then the whole log."""
    shutil.rmtree(folder / ".dashboard", ignore_errors=True)
    began = time.perf_counter()
    dashboard = Dashboard(folder)
    wait_for(lambda: len(dashboard.ask("runs")["runs"]) == 2)
    dashboard.ask("run", run="a")
    rows = {"dashboard's first answer": {"seconds": time.perf_counter() - began, **_peak_mb(dashboard)}}
    wait_for(lambda: not dashboard.ask("run", run="a")["is_preview"], every_s=1.0)
    rows["dashboard, read whole"] = {"seconds": time.perf_counter() - began, **_peak_mb(dashboard)}
    dashboard.close()
    return rows


def _peak_mb(dashboard: Dashboard) -> dict[str, float]:
    """Of the server, or of the process that reads logs for it, whichever is larger."""
    status = [Path(f"/proc/{process.pid}/status").read_text() for process in dashboard.all()]
    return {"memory (MB)": max(int(text.partition("VmHWM:")[2].split()[0]) for text in status) / 1e3}


def main() -> None:
    """Makes the runs unless they are there, and looks at them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--one", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        run_one(options.one)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "runs"
        for name, parts_at in (("a", options.steps + 1), ("b", options.steps // 2)):
            if not log_dir(folder / name).exists():
                make_run(folder / name, options.steps, parts_at=parts_at)
        num_bytes = sum(path.stat().st_size for path in log_dir(folder / "a").glob("*.jsonl"))
        rows = {name: measured(each) for name, each in commands(folder, Path(temporary)).items()}
        rows |= dashboards_first_answer(folder)
    import torch  # not in the processes that are measured
    from results import write_results

    about = {"steps": options.steps, "log (MB)": round(num_bytes / 1e6)}
    write_results("reading", rows, device=torch.device("cpu"), about=about)


if __name__ == "__main__":
    main()
