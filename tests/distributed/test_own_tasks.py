"""Two ranks and a task of one's own: one corpus, one split, and the held-out loss of what is saved."""

from __future__ import annotations

import datetime
import random
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Subset, random_split

from harness.checkpoint import Checkpointer
from harness.config import DataConfig, ParallelConfig, TrainConfig
from harness.data import (
    LossSum,
    SourceFile,
    Task,
    evaluation_batches,
    fingerprint,
    load_text,
    run_loss,
    text_files,
)
from harness.dist import World, agreement, plain
from harness.env import launched
from harness.errors import ConfigError, DataError, TaskError
from harness.training.agreed import agree_on_data, agree_on_files, agree_on_settings
from harness.training.evaluate import evaluate
from harness.training.tasks import build_task
from tests.support.distributed import run_ranks
from tests.support.own_tasks import Points, own_config, points_task, run_loop, squared_error
from tests.support.runs import corpus


def world_of(rank: int, size: int) -> World:
    return World(rank=rank, local_rank=rank, world_size=size, device=torch.device("cpu"))


class Normed(nn.Module):
    """Its running mean is far from what one rank alone sees: the data of the ranks differs much."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.blocks = nn.BatchNorm1d(4, momentum=0.9), nn.ModuleList([nn.Linear(4, 1)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](self.norm(x))


class Scattered(Points):
    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = super().__getitem__(index)
        return {**sample, "x": sample["x"] * 10.0 ** (index % 3)}


def int_loss(model: nn.Module, batch: dict[str, Tensor]) -> LossSum:
    loss = squared_error(model, batch)
    return LossSum(loss.total.view(1), len(batch["x"]))


def normed(config: TrainConfig) -> Task:
    return points_task(model=Normed(), train_data=Scattered(), val_data=Points(3, shift=0.5), loss=int_loss)


def held_out_loss(rank: int, size: int, folder: str, strategy: str) -> tuple[float, float, bool]:
    config = own_config(
        Path(folder), normed, f"--parallel.strategy={strategy}", "--loop.steps=3", "--loop.eval_samples=3"
    )
    world = world_of(rank, size)
    run = run_loop(config, world)
    model = Normed()
    with Checkpointer(Path(folder) / "runs/own/checkpoints") as checkpoints:
        checkpoints.load({"model": model})
    model.eval()
    batches = [batch for batch, _ in evaluation_batches(run.task.val_data, num_samples=3, micro_batch=3)]
    with torch.no_grad():
        (loss,) = [int_loss(model, batch) for batch in batches]
    mine = plain(run.model).norm.running_mean.clone()
    evaluate(run.model, run.task, config, world, precision="fp32")
    untouched = torch.equal(mine, plain(run.model).norm.running_mean)
    return run.counters.last_val_loss, loss.total.item() / 3, untouched


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_every_rank_has_the_held_out_loss_of_the_model_that_is_saved(strategy: str, tmp_path: Path) -> None:
    ranks = run_ranks(held_out_loss, 2, str(tmp_path), strategy)
    (first, saved, _), (second, _, _) = ranks
    assert first == second
    assert first == pytest.approx(saved, rel=1e-5)
    assert all(untouched for _, _, untouched in ranks)


def split_by(config: TrainConfig) -> Task:
    """What the run is called says how it splits."""
    points = Points()
    if config.name == "length":
        return points_task(train_data=Points(40 + launched().rank))
    if config.name == "torch":
        train, val = random_split(points, [30, 10])
        return points_task(train_data=train, val_data=val)
    order = list(range(40))
    if config.name == "random":
        random.shuffle(order)
    else:
        generator = np.random if config.name == "numpy" else np.random.default_rng()
        generator.shuffle(order)
    return points_task(train_data=Subset(points, order[:30]), val_data=Subset(points, order[30:]))


def told_data(folder: str, name: str) -> str:
    config = own_config(Path(folder), split_by, f"--name={name}")
    try:
        return str(agree_on_data(build_task(config), config))
    except DataError as error:
        return f"refused: {error}"


def told_text(rank: int, folder: str) -> str:
    # The file that rank 1 finds has grown since rank 0 looked.
    config = DataConfig(paths=(f"{folder}/{rank}",), sequence_length=16)
    files = agree_on_files(TrainConfig(data=config))
    return " ".join(
        fingerprint(part) for part in load_text(config, cache_dir=Path(folder, "cache"), files=files)
    )


def told_settings(rank: int) -> str:
    local = TrainConfig(runs_dir=f"runs{rank}", parallel=ParallelConfig(threads=rank + 1))
    agree_on_settings(local)
    try:
        agree_on_settings(TrainConfig(name=f"run{rank}"))
    except ConfigError as error:
        return f"refused: {error}"
    return ""


def told(rank: int, size: int, folder: str) -> dict[str, str]:
    names = ("torch", "numpy", "random", "unseeded", "length")
    by_name = {name: told_data(folder, name) for name in names}
    return {**by_name, "text": told_text(rank, folder), "settings": told_settings(rank)}


def test_ranks_train_on_the_same_data_or_all_of_them_say_why_not(tmp_path: Path) -> None:
    for rank in range(2):
        corpus(tmp_path / str(rank), num_files=20)
    with open(tmp_path / "1/000.txt", "a") as file:
        file.write("and more")
    first, second = run_ranks(told, 2, str(tmp_path))
    assert first == second
    refused = {name: words for name, words in first.items() if words.startswith("refused")}
    assert sorted(refused) == ["length", "settings", "unseeded"]
    assert "the training data of rank 0 is 40 samples" in refused["length"]
    assert "that of rank 1 is 41 samples" in refused["length"]
    assert "name is 'run0' on rank 0 and 'run1' on rank 1" in refused["settings"]


def slowly_listed(config: DataConfig) -> list[SourceFile]:
    time.sleep(2)
    return text_files(config)


def patient(rank: int, size: int, folder: str) -> int:
    _set_pg_timeout(datetime.timedelta(seconds=1), None)  # of training's collectives
    with patch("harness.training.agreed.text_files", slowly_listed):
        files = agree_on_files(TrainConfig(data=DataConfig(paths=(folder,))))
    assert files is not None
    return len(files)


def test_ranks_wait_for_a_listing_longer_than_for_a_collective(tmp_path: Path) -> None:
    corpus(tmp_path, num_files=5)
    assert run_ranks(patient, 2, str(tmp_path)) == [5, 5]


def told_of_a_lost_rank(rank: int, size: int, strategy: str) -> str:
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=1))
    model: nn.Module = Normed()
    if strategy == "fsdp":
        fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
    else:
        model = DistributedDataParallel(model, process_group=group)
    try:
        if rank == 0:  # the other one takes no part
            run_loss(points_task(), model, {"x": torch.ones(2, 4), "y": torch.ones(2, 1)})
    except RuntimeError as error:
        return type(error).__name__
    except TaskError as error:
        return str(error)
    return "nothing raised"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_lost_rank_is_not_laid_on_the_loss(strategy: str) -> None:
    assert run_ranks(told_of_a_lost_rank, 2, strategy)[0] == "RuntimeError"


def broken_on(config: TrainConfig) -> Task:
    if str(launched().rank) in config.name:
        raise KeyError("dim")
    return points_task()


def told_failures(rank: int, size: int, folder: str) -> list[tuple[str, tuple[int, ...]]]:
    failures = []
    for name in ("01", "1", "0"):
        try:
            run_loop(own_config(Path(folder), broken_on, f"--name={name}"), world_of(rank, size))
        except TaskError as error:
            failures.append((str(error), error.ranks))
    return failures


def test_a_task_that_fails_tells_on_which_ranks(tmp_path: Path) -> None:
    first, second = run_ranks(told_failures, 2, str(tmp_path))
    assert first == second
    assert [ranks for _, ranks in first] == [(), (1,), (0,)]
    for words, _ in first:
        assert "KeyError: 'dim'" in words
        assert "in broken_on" in words


DTYPES = ("bool", "int8", "int16", "uint16", "uint32", "int64", "float8_e4m3fn", "bfloat16", "complex64")


class Mixed(nn.Linear):
    """Buffers of every kind, with this rank's number in each."""

    def __init__(self, rank: int) -> None:
        super().__init__(4, 1)
        for name in DTYPES:
            self.register_buffer(f"a_{name}", torch.full((2, 3), float(rank)).to(getattr(torch, name)))
        self.register_buffer("transposed", torch.full((5, 2), float(rank)).t())
        self.register_buffer("long", torch.full((1001,), rank))
        self.register_buffer("none_of", torch.empty(0))
        self.register_buffer("own", torch.full((3,), rank), persistent=False)
        self.register_buffer("expanded", torch.full((1,), rank).expand(4))
        with torch.inference_mode():
            self.register_buffer("inferred", torch.full((3,), rank))
        self.seen: dict[str, float] = {}

    def values(self) -> dict[str, float]:
        return {
            name: abs(buffer.to(torch.complex64)).max().item()
            for name, buffer in self._buffers.items()
            if len(buffer)
        }

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.values()
        return super().forward(x)


def buffers_seen(rank: int, size: int) -> tuple[list[dict[str, float]], bool]:
    agreement._PORTION_BYTES = 1000  # so that buffers are cut, and share a message
    model = Mixed(rank)
    config, world = TrainConfig(task="test:mixed"), world_of(rank, size)
    versions = {name: buffer._version for name, buffer in model._buffers.items() if name != "inferred"}
    evaluate(model, points_task(model=model), config, world, precision="fp32", num_samples=4)
    after = {name: buffer._version for name, buffer in model._buffers.items() if name != "inferred"}
    return [model.seen, model.values()], versions == after


def test_an_evaluation_sees_rank_0s_buffers_of_any_kind_and_writes_none() -> None:
    (first, second) = run_ranks(buffers_seen, 2)
    assert [untouched for _, untouched in (first, second)] == [True, True]
    kept = {"own", "expanded", "inferred"}
    assert {name for name, value in second[0][0].items() if value == 1.0} == kept
    assert set(second[0][1].values()) == {1.0}
    assert first[0][0] == first[0][1] == dict.fromkeys(second[0][0], 0.0)
