"""Tasks of one's own, small ones, for tests: points on a line, and what people do to them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from harness.config import TrainConfig, parse_arguments
from harness.data import LossSum, Task
from harness.dist import World
from harness.stop import StopRequest
from harness.tracking.mirrors import MirrorHandle
from harness.training import Callback
from harness.training.build import build_run
from harness.training.loop import Run, train_loop
from harness.training.summary import Ending

__all__ = ["ALONE", "Drawing", "Points", "outlying", "own_config", "points_task", "run_loop", "squared_error"]

ALONE = World(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


class Points:
    """`count` points with 4 inputs; sample i is a function of i and `shift`."""

    def __init__(self, count: int = 40, *, shift: float = 0.0) -> None:
        self.count, self.shift = count, shift

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        x = torch.arange(4.0) * 0.1 + index / self.count + self.shift
        return {"x": x, "y": x.sum().view(1)}


class Drawing(Points):
    """Adds noise from all three global generators."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = super().__getitem__(index)
        noise = torch.rand(()) + float(np.random.rand()) + random.random()
        return {**sample, "x": sample["x"] + noise}


def squared_error(model: nn.Module, batch: dict[str, Tensor]) -> LossSum:
    error = model(batch["x"]) - batch["y"]
    return LossSum(error.square().sum(), torch.tensor(len(error), device=error.device))


def points_task(**changes: Any) -> Task:
    parts: dict[str, Any] = {
        "model": nn.Linear(4, 1),
        "loss": squared_error,
        "train_data": Points(),
        "val_data": Points(8, shift=0.5),
    }
    return Task(**{**parts, **changes})


class Outlying(Points):
    """Sample 17 has a target far from all others."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = super().__getitem__(index)
        return {**sample, "y": sample["y"] + (1000.0 if index == 17 else 0.0)}


def outlying(config: TrainConfig) -> Task:
    return points_task(train_data=Outlying())


def own_config(folder: Path, build: Callable[[TrainConfig], Any], *more: str) -> TrainConfig:
    """A run of six steps of a task whose function stands in a test module."""
    settings = {
        "runs_dir": folder / "runs",
        "name": "own",
        "task": f"{build.__module__}:{build.__name__}",
        "optim.name": "sgd",
        "optim.lr": 0.01,
        "loop.steps": 6,
        "loop.global_batch": 8,
        "loop.eval_every": 0,
        "checkpoint.every": 0,
        "schedule.warmup_steps": 0,
        "parallel.device": "cpu",
        "tracking.tensorboard": "false",
        "tracking.progress": "off",
        "tracking.system_every_s": 0,
        "tracking.histograms_every": 0,
    }
    return parse_arguments([*(f"--{key}={value}" for key, value in settings.items()), *more])


def run_loop(
    config: TrainConfig,
    world: World = ALONE,
    callbacks: Sequence[Callback] = (),
    *,
    begin: Callable[[Run], Any] = lambda run: None,
) -> Run:
    """Builds a run and trains it to its end; without mirrors and pictures, which take longer than that.
    `begin` is called just before the first step."""
    no_mirrors = patch("harness.tracking.recorder.start_mirrors", lambda *_: MirrorHandle(None))
    with no_mirrors, StopRequest() as stop:
        run = build_run(config, world, stop, callbacks)
        try:
            begin(run)
            train_loop(run)
        finally:
            run.guard.close()
            run.loader.close()
            run.checkpointer.close()
            run.journal.close(Ending(status="finished"))
        return run
