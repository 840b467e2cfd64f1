"""Small real runs of the whole program, in processes of their own."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from harness.config import TrainConfig, parse_arguments

__all__ = ["ROOT", "corpus", "program", "start", "tiny", "tiny_config", "wait_for"]

ROOT = Path(__file__).parents[2]
PROGRAM = str(ROOT / "harness" / "train.py")


def corpus(folder: Path, *, num_files: int = 40, num_words: int = 300, seed: int = 0) -> Path:
    """A folder of small text files, the same bytes for the same seed."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(50)]
    for number in range(num_files):
        (folder / f"{number:03d}.txt").write_text(" ".join(draw.choices(words, k=num_words)))
    return folder


def tiny(tmp_path: Path, *more: str) -> list[str]:
    """Arguments of a run that takes a second or two on one core."""
    settings = {
        "runs_dir": tmp_path / "runs",
        "name": "tiny",
        "data.paths": f"[{corpus(tmp_path / 'corpus')}]",
        "data.cache_dir": tmp_path / "cache",
        "data.sequence_length": 32,
        "model.num_layers": 2,
        "model.dim": 32,
        "model.num_heads": 2,
        "loop.steps": 12,
        "loop.global_batch": 8,
        "loop.eval_every": 6,
        "loop.eval_samples": 8,
        "checkpoint.every": 4,
        "schedule.warmup_steps": 2,
        "tracking.log_every": 4,
        "tracking.tensorboard": "false",
        "tracking.progress": "lines",
    }
    return [f"--{key}={value}" for key, value in settings.items()] + list(more)


def tiny_config(tmp_path: Path, *more: str) -> TrainConfig:
    """The same as a configuration, for runs inside the test's own process."""
    return parse_arguments(tiny(tmp_path, *more))


def start(
    command: Sequence[str], *, cwd: Path | None = None, output: Path | None = None, **environment: str
) -> subprocess.Popen[str]:
    """Starts a command in a session of its own, one thread per process, its output in one pipe or file."""
    with contextlib.nullcontext(subprocess.PIPE) if output is None else output.open("ab") as stdout:
        return subprocess.Popen(
            list(command),
            cwd=cwd or ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=stdout,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def program(
    arguments: Sequence[str],
    *,
    launcher: Sequence[str] = (sys.executable,),
    target: str = PROGRAM,
    timeout_s: float = 90.0,
    cwd: Path | None = None,
    **environment: str,
) -> tuple[int, str]:
    """Runs the program to its end; its exit code and all that it said. Kills what hangs."""
    process = start([*launcher, target, *arguments], cwd=cwd, **environment)
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"still running after {timeout_s} s:\n{output}") from None
    return process.returncode, output


def wait_for(
    condition: Callable[[], bool], *, timeout_s: float = 30.0, what: str = "it", pause_s: float = 0.02
) -> None:
    """Polls `condition()` until it holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not happen within {timeout_s} s")
        time.sleep(pause_s)
