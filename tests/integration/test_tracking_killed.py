"""Trainers killed at random moments: what was logged is in the log, in TensorBoard and at W&B."""

from __future__ import annotations

import json
import math
import random
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.tracking import open_run
from tests.support.runs import wait_for
from tests.support.wandb_offline import history, records

SEEDS = range(10)  # 50 pass as well
AT_ONCE = 4
"""Trainers that run at the same time: most of what each takes is waiting."""

# Says on its standard output, unbuffered, each step whose `write` has returned.
TRAINER = """
import math, os, sys
from harness.tracking import RunLog, start_mirrors
run_dir, seed = sys.argv[1], int(sys.argv[2])
log = RunLog(run_dir, segment_bytes=20_000)
mirrors = start_mirrors(run_dir, wandb="offline", system_every_s=0.2)
os.write(1, b"side %d\\n" % mirrors.pid)
step = 0
while True:
    value = math.nan if step % 97 == 0 else math.inf if step % 89 == 0 else float(seed * 100_000 + step)
    log.write("step", {"train/loss": value, "train/grad_norm": step / 7}, step=step)
    os.write(1, b"%d\\n" % step)
    step += 1
    if step % 50 == 0:
        import time; time.sleep(0.01)
"""


def expected(seed: int, step: int) -> float:
    return math.nan if step % 97 == 0 else math.inf if step % 89 == 0 else float(seed * 100_000 + step)


def same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


def run_and_kill(run_dir: Path, seed: int) -> int:
    """Kills a trainer after a random time; returns how many steps it had been told were written."""
    rng = random.Random(seed)
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(run_dir), str(seed)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    with process.stdout as said:
        side = int(said.readline().split()[1])
        time.sleep(rng.uniform(0.0, 0.25) if rng.random() < 0.5 else rng.uniform(0.25, 2.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        complete = said.read().rpartition(b"\n")[0].split()
    wait_for(lambda: not psutil.pid_exists(side), timeout_s=240, what="the side process's end")
    return len(complete)


def check_log(run_dir: Path, seed: int, num_written: int) -> int:
    run = open_run(run_dir)
    loss = run.scalars("train/loss")
    assert run.state() == "crashed"
    assert run.num_damaged == 0
    # One more may have been written than was said: it was killed in between.
    assert len(loss.steps) - num_written in (0, 1)
    assert loss.steps.tolist() == list(range(len(loss.steps)))
    assert all(same(value, expected(seed, step)) for step, value in enumerate(loss.values.tolist()))
    return len(loss.steps)


def check_wandb(run_dir: Path, seed: int, num_steps: int) -> None:
    rows = [row for row in history(run_dir) if "train/loss" in row]
    assert [row["step"] for row in rows] == list(range(num_steps))
    assert all(same(float(row["train/loss"]), expected(seed, row["step"])) for row in rows)
    exits = [
        record.exit.exit_code
        for path in (run_dir / "wandb").glob("offline-run-*/*.wandb")
        for record in records(path)
        if record.WhichOneof("record_type") == "exit"
    ]
    assert exits == [1]


class TensorBoardServer:
    """A real server on a port of its own, asked over HTTP."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", "0"]
        command += ["--samples_per_plugin", "scalars=1000000", "--host", "127.0.0.1"]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if found := re.search(r"http://[^\s/]+", line):
                self._url = found.group()
                return
        raise AssertionError("TensorBoard did not start")

    def ask(self, path: str, **query: str) -> Any:
        url = f"{self._url}/data/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            return json.load(answer)

    def scalars(self, run: str, tag: str, num_steps: int) -> list[tuple[int, float]]:
        """The points once there are as many as expected, or as they are after 30 s."""
        deadline = time.monotonic() + 30
        while True:
            try:
                points = self.ask("plugin/scalars/scalars", run=run, tag=tag)
            except urllib.error.HTTPError as error:  # not loaded yet
                error.close()
                points = []
            if len(points) >= num_steps or time.monotonic() > deadline:
                return [(step, float(value)) for _, step, value in points]
            time.sleep(0.5)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        assert self._process.stderr is not None
        self._process.stderr.close()


def check_tensorboard(server: TensorBoardServer, run_dir: Path, seed: int, num_steps: int) -> None:
    points = server.scalars(f"{run_dir.name}/tensorboard", "train/loss", num_steps)
    assert [step for step, _ in points] == list(range(num_steps))
    assert all(same(value, expected(seed, step)) for step, value in points)  # exact: below 2^24


def kill_and_check(folder: Path, seeds: range) -> None:
    run_dirs = {seed: folder / f"run-{seed:02d}" for seed in seeds}
    with ThreadPoolExecutor(AT_ONCE) as threads:
        num_written = dict(zip(seeds, threads.map(run_and_kill, run_dirs.values(), seeds), strict=True))
    num_steps = {seed: check_log(run_dirs[seed], seed, num_written[seed]) for seed in seeds}
    for seed in seeds:
        check_wandb(run_dirs[seed], seed, num_steps[seed])
    assert max(num_steps.values()) > 100
    server = TensorBoardServer(folder)
    try:
        for seed in seeds:
            check_tensorboard(server, run_dirs[seed], seed, num_steps[seed])
    finally:
        server.close()


def test_killed_trainers_lose_nothing(tmp_path: Path) -> None:
    kill_and_check(tmp_path, SEEDS[:2])


@pytest.mark.slow
@pytest.mark.timeout(600)  # the side processes give way to whatever else runs
def test_trainers_killed_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    kill_and_check(tmp_path, SEEDS[2:])
