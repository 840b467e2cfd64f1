"""The worked example in docs/tasks.md does what the page says."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from harness.config import ModelConfig, TrainConfig
from harness.data import Loader, Task, evaluation_batches, load_task

PAGE = Path(__file__).parents[2] / "docs" / "tasks.md"


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    (tmp_path / "sine.py").write_text(example)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "sine", raising=False)
    torch.manual_seed(0)
    return load_task("sine:build")(TrainConfig(model=ModelConfig(dim=32)))


def val_loss(task: Task) -> float:
    with torch.no_grad():
        sums = [
            task.loss(task.model, batch)
            for batch, _ in evaluation_batches(task.val_data, num_samples=97, micro_batch=32)
        ]
    return float(sum(loss.total for loss in sums) / sum(loss.count for loss in sums))


def test_the_example_of_ones_own_task_learns(task: Task) -> None:
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=1e-2)
    loader = Loader(task.train_data, global_batch=64, micro_batch=32)
    before = val_loss(task)
    for _ in range(200):
        optimizer.zero_grad()
        for batch in loader.next():
            (task.loss(task.model, batch).total / 64).backward()
        optimizer.step()
    assert val_loss(task) < 0.02 < 0.2 < before


def test_the_examples_noise_is_new_each_epoch_and_gone_in_validation(task: Task) -> None:
    loader = Loader(task.train_data, global_batch=1000)
    (first,), (second,) = loader.next(), loader.next()
    first_y, second_y = first["y"][first["x"].argsort(0)[:, 0]], second["y"][second["x"].argsort(0)[:, 0]]
    assert not torch.equal(first_y, second_y)
    ((held_out, _),) = evaluation_batches(task.val_data, num_samples=97, micro_batch=97)
    assert torch.equal(held_out["y"], held_out["x"].sin())
