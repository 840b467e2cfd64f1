"""What `--dry_run` predicts, against what processes that train take."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
import torch

from harness.cli.train import run as run_program
from harness.config import TrainConfig
from harness.data import Batch, LossSum, Task, fetch
from harness.dist import World, distribute
from harness.errors import ConfigError
from harness.training import forecast_memory
from harness.training.optim import build_optimizers
from harness.training.tasks import build_task
from tests.support.distributed import run_ranks
from tests.support.runs import tiny, tiny_config

WIDE = ("--model.dim=512", "--model.num_layers=3", "--model.num_heads=8", "--loop.global_batch=4")
FORECAST_WITHIN = 0.1
_M_MMAP_THRESHOLD = -3


def wide(tmp_path: Path, strategy: str) -> TrainConfig:
    return tiny_config(tmp_path, *WIDE, "--data.sequence_length=256", f"--parallel.strategy={strategy}")


def resident_bytes(field: str) -> int:
    """VmRSS, or VmHWM: its peak."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def taken(rank: int, world_size: int, tmp_path: Path, strategy: str) -> int:
    """What the third step of a bare loop adds to the process at most."""
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)  # what is freed goes back
    config = wide(tmp_path, strategy)
    task = build_task(config)
    # Threads, and what torch and gloo load when they are first used.
    torch.distributed.all_reduce(torch.zeros(1))
    torch.nn.Linear(64, 64)(torch.randn(64, 64)).sum().backward()
    model_bytes = sum(p.numel() * 4 for p in task.model.parameters())
    before = resident_bytes("VmRSS") - model_bytes
    world = World(rank=rank, local_rank=rank, world_size=world_size, device=torch.device("cpu"))
    model = distribute(task.model, config.parallel, world)
    optimizers = build_optimizers(model, config.optim, is_sharded=strategy == "fsdp")
    optimizer = optimizers["optimizer"]
    batch = fetch(task.train_data, list(range(config.loop.global_batch // world_size)))
    for step in range(3):
        if step == 2:
            Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now
        loss = task.loss(model, batch)
        loss.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        del loss
    return resident_bytes("VmHWM") - before


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_what_a_rank_takes_is_predicted(tmp_path: Path, strategy: str) -> None:
    forecast = forecast_memory(wide(tmp_path, strategy), num_ranks=2)
    for measured in run_ranks(taken, 2, tmp_path, strategy):
        assert measured == pytest.approx(forecast.total, rel=FORECAST_WITHIN)


def test_the_command_says_it_and_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program(tiny(tmp_path, "--dry_run=4", "--parallel.strategy=fsdp")) == 0
    said = capsys.readouterr().out
    assert "memory of one rank of 4, micro-batches of" in said
    assert re.search(r"total +0\.\d+ GiB", said)
    assert not (tmp_path / "runs").exists()


CONSTANT = torch.linspace(0.5, 1.5, 3)


def odd_task(config: TrainConfig, *, selects: bool = False) -> Task:
    """Its loss holds a tensor that is neither a parameter nor a buffer; or its shape depends on values."""

    def loss(model: torch.nn.Module, batch: Batch) -> LossSum:
        squares = (model(batch["x"]) * CONSTANT).square()
        if selects:
            squares = squares[squares > 0.1]
        return LossSum(squares.sum(), len(batch["x"]))

    data = [{"x": row} for row in torch.randn(16, 8)]
    return Task(model=torch.nn.Linear(8, 3), loss=loss, train_data=data, val_data=data)


def test_constants_are_taken_and_shapes_that_depend_on_values_are_refused(tmp_path: Path) -> None:
    task = ("--task=tests.distributed.test_memory_forecast:odd_task",)
    assert forecast_memory(tiny_config(tmp_path, *task), num_ranks=2).parameters == 4 * (8 * 3 + 3)
    with pytest.raises(ConfigError, match="asks for values of tensors"):
        forecast_memory(tiny_config(tmp_path, *task, "--task_args.selects=true"), num_ranks=2)
