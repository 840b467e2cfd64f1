"""What a task may be works; what it may not be is one error, with value and rule, before the first step."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from harness.config import TrainConfig
from harness.data import LossSum, Task
from harness.errors import HarnessError, TaskError
from harness.runlog.reader import open_run
from tests.support.own_tasks import Points, own_config, points_task, run_loop, squared_error

Pair = namedtuple("Pair", "x y")


class Transformed(Points):
    """Points whose samples `change` turns into something else."""

    def __init__(self, change: Callable[[dict[str, Any], int], Any], count: int = 40) -> None:
        super().__init__(count)
        self.change = change

    def __getitem__(self, index: int) -> Any:
        return self.change(super().__getitem__(index), index)


class AtOnce(Points):
    def __init__(self, change: Callable[[list[Any]], Any]) -> None:
        super().__init__()
        self.change = change

    def __getitems__(self, indices: list[int]) -> Any:
        return self.change([self[index] for index in indices])


def stacked(samples: list[Any]) -> dict[str, Any]:
    return {name: np.stack([sample[name].numpy() for sample in samples]) for name in samples[0]}


def with_loss(change: Callable[[Tensor, int], Any]) -> Task:
    """A task whose loss gives what `change(sum, count)` gives."""

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Any:
        return change((model(batch["x"]) - batch["y"]).square().sum(), len(batch["x"]))

    return points_task(loss=loss)


def nested_loss(model: nn.Module, batch: dict[str, Any]) -> LossSum:
    assert isinstance(batch["where"][0], str)
    assert batch["about"]["ids"][0].dtype == torch.int64
    return squared_error(model, batch["pair"]._asdict())


WORKS: dict[str, Callable[[], Task]] = {
    "count int": lambda: with_loss(lambda total, count: LossSum(total, count)),
    "count float": lambda: with_loss(lambda total, count: LossSum(total, float(count), correct=0)),
    "count numpy": lambda: with_loss(lambda total, count: LossSum(total, np.int64(count), np.array([1]))),
    "shape [1]": lambda: with_loss(
        lambda total, count: LossSum(total.view(1), torch.tensor([count]), torch.tensor([[1]]))
    ),
    "double": lambda: with_loss(lambda total, count: LossSum(total.double(), torch.tensor(float(count)))),
    "nested batch": lambda: points_task(
        loss=nested_loss,
        train_data=Transformed(
            lambda sample, index: {"pair": Pair(**sample), "where": f"{index}.png", "about": {"ids": [index]}}
        ),
        val_data=Transformed(
            lambda sample, index: {"pair": Pair(**sample), "where": "", "about": {"ids": [index]}}, count=3
        ),
    ),
    "arrays at once": lambda: points_task(train_data=AtOnce(stacked)),
    "samples at once": lambda: points_task(train_data=AtOnce(list)),
}

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no task": (lambda: None, "returned NoneType"),
    "no model": (lambda: points_task(model=squared_error), "task's model is .* torch.nn.Module"),
    "lazy model": (lambda: points_task(model=nn.LazyLinear(1)), "weight has no shape yet"),
    "meta model": (lambda: points_task(model=nn.Linear(4, 1, device="meta")), "meta device"),
    "frozen model": (lambda: points_task(model=nn.Linear(4, 1).requires_grad_(False)), "requires a gradient"),
    "no loss": (lambda: points_task(loss=None), "task's loss is None"),
    "stream": (lambda: points_task(train_data=iter([])), "task's train_data .* has a length"),
    "no training data": (lambda: points_task(train_data=[]), "train_data has no samples"),
    "no validation data": (lambda: points_task(val_data=[]), "val_data has no samples"),
    "tokens": (lambda: points_task(tokens_per_sample=0), "tokens_per_sample is 0"),
    "bytes": (lambda: points_task(bytes_per_token=0.0), "bytes_per_token is 0.0"),
    "tuples": (lambda: points_task(train_data=[(1, 2)] * 9), "sample of list is a tuple"),
    "tuples held out": (lambda: points_task(val_data=[(1, 2)] * 9), "sample of list is a tuple"),
    "none in it": (
        lambda: points_task(val_data=Transformed(lambda sample, index: {**sample, "z": None})),
        "samples of Transformed do not make a batch",
    ),
    "ragged": (
        lambda: points_task(val_data=Transformed(lambda sample, index: {"x": torch.zeros(index + 1)})),
        "samples of Transformed do not make a batch",
    ),
    "nothing at once": (lambda: points_task(val_data=AtOnce(lambda samples: None)), "returned a NoneType"),
    "plain tensor": (lambda: with_loss(lambda total, count: total), r"returned a tensor of shape \[\]"),
    "tuple of both": (lambda: with_loss(lambda total, count: (total, count)), "returned a tuple"),
    "nothing": (lambda: with_loss(lambda total, count: None), "returned None"),
    "unreduced": (
        lambda: with_loss(lambda total, count: LossSum(total.expand(3), count)),
        r"LossSum.total is a tensor of shape \[3\].*sum",
    ),
    "float": (lambda: with_loss(lambda total, count: LossSum(total.item(), count)), "total is a float"),
    "no count": (lambda: with_loss(lambda total, count: LossSum(total, None)), "LossSum.count is None"),
    "detached": (
        lambda: with_loss(lambda total, count: LossSum(total.detach(), count)), "carries no gradient",
    ),
    "wrong field": (
        lambda: points_task(val_data=Transformed(lambda sample, index: {"z": 1.0})), "raised KeyError: 'x'",
    ),
}  # fmt: skip

_CASE: list[Callable[[], Any]] = []


def build(config: TrainConfig) -> Any:
    return _CASE[-1]()


@pytest.mark.parametrize("case", WORKS.values(), ids=WORKS)
def test_what_a_task_may_be_trains_and_is_evaluated(case: Callable[[], Task], tmp_path: Path) -> None:
    _CASE.append(case)
    counters = run_loop(own_config(tmp_path, build, "--loop.steps=2", "--loop.micro_batch=4")).counters
    assert (counters.step, counters.tokens, counters.num_skips) == (2, 16, 0)
    assert np.isfinite(counters.last_val_loss)


@pytest.mark.parametrize(("case", "words"), REFUSED.values(), ids=REFUSED)
def test_what_it_may_not_be_is_said_before_the_first_step(
    case: Callable[[], Any], words: str, tmp_path: Path
) -> None:
    _CASE.append(case)
    with pytest.raises(HarnessError, match=words) as caught:
        run_loop(own_config(tmp_path, build))
    assert caught.value.rule
    if (tmp_path / "runs/own/log").exists():
        assert len(open_run(tmp_path / "runs/own").scalars("train/loss").values) == 0


class Broken(Points):
    def __getitem__(self, index: int) -> Any:
        return {"x": self.look_up(index)}

    def look_up(self, index: int) -> Any:
        raise FileNotFoundError(2, "No such file or directory", f"/data/{index}.png")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_of_ones_own_code_shows_ones_own_lines_alone(num_workers: int, tmp_path: Path) -> None:
    _CASE.append(lambda: points_task(train_data=Broken()))
    with pytest.raises(TaskError) as caught:
        run_loop(own_config(tmp_path, build, f"--data.num_workers={num_workers}"))
    problem, *frames = str(caught.value).splitlines()
    assert "Broken[0] raised FileNotFoundError: [Errno 2] No such file or directory: '/data/0.png'" in problem
    assert [line for line in frames if line.startswith("  File")] == [
        line for line in frames if __file__ in line
    ]
    assert "in look_up" in frames[-2] or "in look_up" in frames[-3]
    assert len(frames) <= 8
