"""Evaluation reads: it scores what a checkpoint holds, and training goes on as if it had not been."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from harness.config import TrainConfig
from harness.data import LossSum, Task
from harness.errors import ConfigError
from harness.runlog.reader import open_run
from harness.stability import StepGuard
from harness.training.evaluate import evaluate
from harness.training.tasks import build_task
from tests.support.own_tasks import (
    ALONE,
    Drawing,
    Points,
    own_config,
    points_task,
    run_loop,
    squared_error,
)


class Restless(nn.Module):
    """A model that draws, counts and replaces buffers in every forward pass, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(4), nn.Linear(4, 1)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(4))
        self.register_buffer("cache", None)
        self.norm.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.calls += 1
        self.seen = 0.9 * self.seen + 0.1 * args[0].detach().mean(0)
        self.cache = args[0].detach()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x + 0.1 * self.seen + 0.01 * self.calls))


def drawing_loss(model: nn.Module, batch: dict[str, Tensor]) -> LossSum:
    noise = torch.rand(()) + float(np.random.rand()) + random.random()
    loss = squared_error(model, {**batch, "x": batch["x"] * noise})
    return LossSum(loss.total, loss.count)


def restless(config: TrainConfig) -> Task:
    return points_task(model=Restless(), loss=drawing_loss, train_data=Drawing(), val_data=Drawing(8))


def test_training_is_bitwise_the_same_however_often_it_evaluates(tmp_path: Path) -> None:
    ends = []
    for every in (0, 1, 4):
        config = own_config(tmp_path, restless, f"--loop.eval_every={every}", f"--name=every{every}")
        ends.append(dict(run_loop(config).model.state_dict()))
        losses = open_run(tmp_path / "runs" / f"every{every}").scalars("train/loss").values
        ends[-1]["losses"] = torch.from_numpy(losses)
    assert all(torch.equal(end[name], ends[0][name]) for end in ends[1:] for name in ends[0])


def test_an_evaluation_says_the_same_twice_and_leaves_everything_as_it_was(tmp_path: Path) -> None:
    config = own_config(tmp_path, restless)
    task = build_task(config)
    task.model.out.eval()
    modes = [module.training for module in task.model.modules()]
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    first = evaluate(task.model, task, config, ALONE, precision="fp32")
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1][1], np.random.get_state()[1])
    assert states[2] == random.getstate()
    assert [module.training for module in task.model.modules()] == modes
    after = task.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    assert evaluate(task.model, task, config, ALONE, precision="fp32") == first


class Drifting(nn.Linear):
    """An average of weights that is updated in the forward pass, in eval mode too."""

    def __init__(self) -> None:
        super().__init__(4, 1)
        self.average = nn.Parameter(torch.zeros(1, 4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.average.lerp_(self.weight, 0.1)
        return super().forward(x)


def drifting(config: TrainConfig) -> Task:
    return points_task(model=Drifting())


def test_an_evaluation_that_changes_parameters_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"parameter average.*if model.training"):
        run_loop(own_config(tmp_path, drifting))
    assert len(open_run(tmp_path / "runs/own").scalars("train/loss").values) == 0


class Masked(nn.Linear):
    """128 KiB of constants, and a buffer as large that counts on the last call."""

    def __init__(self) -> None:
        super().__init__(4, 1)
        self.register_buffer("mask", torch.ones(128, 256))
        self.register_buffer("expanded", torch.ones(1).expand(1 << 20))
        self.writes = False

    def forward(self, x: Tensor) -> Tensor:
        if self.writes:
            self.mask.add_(1)
        return super().forward(x) * self.mask[0, 0]


def masked(config: TrainConfig) -> Task:
    return points_task(model=Masked())


def test_a_large_constant_buffer_is_a_constant_for_the_guard_after_an_evaluation() -> None:
    task = masked(TrainConfig())
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.01)
    guard = StepGuard(task.model, optimizer)
    config = TrainConfig(task="test:masked")
    batch = {name: value[None] for name, value in Points()[3].items()}

    def steps(count: int) -> list[str]:
        for _ in range(count):
            loss = task.loss(task.model, batch).total
            loss.backward()
            guard.step(loss)
            optimizer.zero_grad()
        return [name for buffer in guard._device.buffers._constants for _, name in buffer.places]

    assert steps(12) == ["mask"]
    evaluate(task.model, task, config, ALONE, precision="fp32", num_samples=4)
    assert steps(1) == ["mask"]
    guard.close()


def test_buffers_too_large_to_be_copied_may_not_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    task, config = masked(TrainConfig()), TrainConfig(task="test:masked")
    evaluate(task.model, task, config, ALONE, precision="fp32", num_samples=4)
    task.model.writes = True
    evaluate(task.model, task, config, ALONE, precision="fp32", num_samples=4)
    assert task.model.mask.eq(1).all()
    monkeypatch.setattr("harness.training.buffers._MAX_COPIED_BYTES", 1 << 17, raising=False)
    monkeypatch.setattr("harness.training.buffers._LARGE_BYTES", 1 << 10, raising=False)
    task.model.register_buffer("table", torch.ones(300))
    with pytest.raises(ConfigError, match=r"evaluation changed the buffer mask"):
        evaluate(task.model, task, config, ALONE, precision="fp32", num_samples=4)


def padding_only(config: TrainConfig) -> Task:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> LossSum:
        counted = model.training
        return LossSum((model(batch["x"]) * counted).sum(), len(batch["x"]) * counted)

    return points_task(loss=loss)


def test_held_out_samples_without_a_token_give_nan_and_not_an_error(tmp_path: Path) -> None:
    counters = run_loop(own_config(tmp_path, padding_only, "--loop.eval_every=2")).counters
    assert (counters.step, counters.val_step) == (6, 6)
    assert np.isnan(counters.last_val_loss)


def pretrained(freeze: str, *, eval_mode: bool) -> nn.Module:
    model = nn.Sequential()
    model.backbone = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    model.head = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.Linear(4, 1))
    for part in freeze.split():
        model.get_submodule(part).requires_grad_(False)
    return model.eval() if eval_mode else model


def from_eval(config: TrainConfig) -> Task:
    return points_task(model=pretrained("backbone", eval_mode=True))


def with_a_part_in_eval(config: TrainConfig) -> Task:
    model = pretrained("", eval_mode=False)
    model.backbone.eval()
    return points_task(model=model)


def modes_of(model: Any) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def test_a_model_in_eval_mode_trains_in_train_mode_but_for_what_is_frozen(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="harness"):
        modes = modes_of(build_task(own_config(tmp_path, from_eval)).model)
    assert {name for name, training in modes.items() if training} == {
        "", "head", "head.0", "head.1", "head.2",
    }  # fmt: skip
    (said,) = [record.message for record in caplog.records if "eval mode" in record.message]
    assert said.endswith("but for what has no trainable parameter: backbone")


def test_a_part_that_a_task_puts_in_eval_mode_stays_there(tmp_path: Path) -> None:
    modes = modes_of(build_task(own_config(tmp_path, with_a_part_in_eval)).model)
    assert {name for name, training in modes.items() if not training} == {
        "backbone", "backbone.0", "backbone.1", "backbone.2",
    }  # fmt: skip


def too_few(config: TrainConfig) -> Task:
    return points_task(val_data=Points(1))


def test_one_held_out_sample_is_enough(tmp_path: Path) -> None:
    assert np.isfinite(run_loop(own_config(tmp_path, too_few)).counters.last_val_loss)
