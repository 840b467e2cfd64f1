"""Passes made again on two ranks: each for itself, and the next step is what it would have been."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.config import TrainConfig
from harness.data import Task
from harness.dist import World, plain
from harness.records import StepRecord
from harness.runlog.events import Incident
from harness.runlog.reader import open_run
from harness.training import Callback
from harness.training.callbacks import Training
from harness.training.loop import Run
from harness.training.recompute import aside
from tests.support.distributed import run_ranks
from tests.support.own_tasks import own_config, points_task, run_loop

SETTINGS = ("--loop.steps=3", "--loop.micro_batch=1", "--parallel.strategy=ddp")


class Drifting(nn.Module):
    """What it computes depends on a buffer that each forward pass moves, and on dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.mean: Tensor
        self.drop, self.last = nn.Dropout(0.5), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.drop(x - self.mean))
        with torch.no_grad():
            self.mean.lerp_(x.mean(0), 0.5)
        return out


def drifting(config: TrainConfig) -> Task:
    return points_task(model=Drifting())


def trained(
    rank: int, size: int, folder: str, name: str, *more: str, callbacks: Sequence[Callback] = ()
) -> tuple[dict[str, Tensor], int]:
    """The state at the end, and how many incidents there were."""
    config = own_config(Path(folder) / name, drifting, *SETTINGS, *more)
    world = World(rank=rank, local_rank=rank, world_size=size, device=torch.device("cpu"))
    run = run_loop(config, world, callbacks)
    directory = Path(folder) / name / "runs" / "own"
    events = [] if rank else [e for e in open_run(directory).events() if isinstance(e.what, Incident)]
    return {**plain(run.model).state_dict(), "rng": torch.get_rng_state()}, len(events)


def unequal_shares(rank: int, size: int, folder: str) -> list[Any]:
    """5 samples in micro-batches of 1: rank 1 has one micro-batch less, and makes a blank pass before it."""
    few = "--loop.global_batch=5"
    return [
        trained(rank, size, folder, "plain", few),
        trained(rank, size, folder, "twice", few, "--incidents.recompute_every=1"),
    ]


def test_a_step_computed_twice_makes_the_blank_passes_twice_too(tmp_path: Path) -> None:
    for (plain_state, _), (state, num_incidents) in run_ranks(unequal_shares, 2, str(tmp_path)):
        assert num_incidents == 0
        assert [name for name in state if not torch.equal(state[name], plain_state[name])] == []


class AgainOnRank0(Callback):
    """Runs a micro-batch again there alone, as if rank 1 had failed before DDP could hand out buffers."""

    def on_step(self, run: Training, record: StepRecord) -> None:
        assert isinstance(run, Run)
        if run.world.rank == 0:
            with aside(plain(run.model)):
                run.runner.locally(record.step, {"x": torch.ones(2, 4), "y": torch.ones(2, 1)})


def one_rank_again(rank: int, size: int, folder: str) -> list[dict[str, Tensor]]:
    return [
        trained(rank, size, folder, "plain")[0],
        trained(rank, size, folder, "again", callbacks=[AgainOnRank0()])[0],
    ]


def test_a_pass_of_one_rank_alone_waits_for_nobody_and_leaves_ddp_as_it_was(tmp_path: Path) -> None:
    for want, have in run_ranks(one_rank_again, 2, str(tmp_path)):
        assert [name for name in have if not torch.equal(have[name], want[name])] == []
