"""Runs of two ranks of which one hangs, is stopped or is slow: is it named, the right one, and in time?"""

from __future__ import annotations

import random
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from harness.runlog.paths import incidents_dir  # noqa: E402  (the repository has to be on the path first)
from tests.support.hanging_anywhere import PLACES, WAYS, plan, struck_at  # noqa: E402
from tests.support.launch import launch  # noqa: E402
from tests.support.runs import tiny  # noqa: E402

__all__ = ["hang_run"]

LIMIT_S = 10.0
"""Of everything, once three of its kind are known."""
WAIT_S = 30.0
"""`parallel.timeout_s`: the limit of the first three of each kind, and of the start."""
GRACE_S = 30.0
"""What the promise gives besides."""
TIMEOUT_S = 400.0
SETTINGS = (
    *(f"--watchdog.min_step_s={LIMIT_S}", f"--watchdog.min_other_s={LIMIT_S}", "--watchdog.ratio=1"),
    *(f"--parallel.timeout_s={WAIT_S}", "--loop.steps=30", "--loop.eval_every=3", "--checkpoint.every=3"),
    "--callbacks=[tests.support.hanging_anywhere:hangs_as_planned]",
)


def hang_run(folder: Path, draw: random.Random, number: int) -> tuple[str, int, float | None]:
    """A run in which it happens, and its end; what happened, and the seconds until all ranks were gone.

    Raises:
        AssertionError: the rank is not named, or not in time; or one that is merely late is.
    """
    place, way = PLACES[number % len(PLACES)], WAYS[number // len(PLACES) % len(WAYS)]
    if place == "worker":
        way = "stop"
    rank = draw.randrange(2)
    count = 1 if place == "start" else draw.randint(1, 6)
    what = f"{way} in {place}, rank {rank}, passing {count}"
    folder.mkdir(parents=True)
    seconds = 4.0 if way == "late" else 2 * WAIT_S
    plan(folder, place=place, way=way, rank=rank, count=count, seconds=seconds)
    workers = ("--data.num_workers=1",) if place == "worker" else ()
    code, output = launch(tiny(folder, *SETTINGS, *workers), timeout_s=TIMEOUT_S, PYTHONPATH=str(ROOT))
    ended = time.time()
    struck = struck_at(folder)
    assert struck is not None, f"{what}: it never happened\n{output}"
    if way == "late":
        assert code == 0, f"{what}: {output}"
        assert not incidents_dir(folder / "runs/tiny").exists(), f"{what}: {output}"
        return what, 1, None
    took_s = ended - struck
    _check_named(folder / "runs/tiny", what, rank, output, took_s)
    longest_s = (LIMIT_S if count > 4 else WAIT_S) + GRACE_S
    assert took_s <= longest_s, f"{what}: {took_s:.0f} s, and {longest_s:.0f} s are promised\n{output}"
    return what, 1, took_s


def _check_named(run_dir: Path, what: str, rank: int, output: str, took_s: float) -> None:
    said = re.findall(r"the run hangs: (.*)", output)
    assert said, f"{what}: nobody is named within {took_s:.0f} s\n{output}"
    named = {int(number) for number in re.findall(r"rank (\d+) \(", said[0])}
    assert named == {rank}, f"{what}: {sorted(named)} are named\n{output}"
    if " in start" not in what:  # at which the run has no directory yet
        reports = list(incidents_dir(run_dir).glob("hang-*/report.txt"))
        assert len(reports) == 1, f"{what}: {len(reports)} reports\n{output}"
