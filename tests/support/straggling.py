"""Runs of two gloo ranks of which one holds up the other."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import torch

from harness import TrainConfig
from harness.data import Task
from harness.dist import World
from harness.runlog.reader import open_run
from tests.support.distributed import run_ranks
from tests.support.own_tasks import Points, own_config, points_task, run_loop

__all__ = ["late_run"]

STEPS = 40
BATCH = 4
"""Samples of a rank in a step."""


class LateOn(Points):
    """Its samples take their time on one rank."""

    def __init__(self, rank: int, seconds: float) -> None:
        super().__init__()
        self.rank, self.seconds = rank, seconds

    def __getitem__(self, index: int) -> dict[str, Any]:
        if torch.distributed.get_rank() == self.rank:
            time.sleep(self.seconds)
        return super().__getitem__(index)


def points(config: TrainConfig) -> Task:
    return points_task()


def late_points(config: TrainConfig, rank: int, seconds: float) -> Task:
    return points_task(train_data=LateOn(rank, seconds))


def late_run(
    folder: Path, kind: Literal["straggler", "data-bound rank"], *, rank: int, strategy: str, late_s: float
) -> list[tuple[str, int]]:
    """Kind and rank of the incidents of a run in which `rank` is late by so many seconds in each step."""
    settings = [f"--parallel.strategy={strategy}", f"--loop.steps={STEPS}", "--straggler.window_s=0.8"]
    if kind == "straggler":
        faults = (f"{{step: {n}, rank: {rank}, kind: slow, seconds: {late_s}}}" for n in range(STEPS))
        settings.append(f"--faults=[{', '.join(faults)}]")
    else:
        settings += [
            "--data.num_workers=0",
            f"--task_args.rank={rank}",
            f"--task_args.seconds={late_s / BATCH}",
        ]
    run_ranks(_trained, 2, str(folder), kind == "straggler", settings)
    (directory,) = (folder / "runs").iterdir()
    events = open_run(directory).events("incident")
    return sorted({(event.details["kind"], event.details["rank"]) for event in events})


def _trained(rank: int, size: int, folder: str, is_slow: bool, settings: list[str]) -> None:
    world = World(rank=rank, local_rank=rank, world_size=size, device=torch.device("cpu"))
    run_loop(own_config(Path(folder), points if is_slow else late_points, *settings), world)
