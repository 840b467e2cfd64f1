"""Tasks of one's own: found from the current directory, or refused with what is wrong; the loss sum."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from harness.config import TrainConfig
from harness.data import Task, cross_entropy, load_task
from harness.errors import ConfigError

MODULE = """
import torch
from harness.data import Task

def build(config):
    return Task(model=torch.nn.Linear(1, 1), loss=None, train_data=[config.seed], val_data=[])

def build_nothing(config):
    return {}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(tmp_path)])
    for name in [name for name in sys.modules if name.startswith("own_")]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


def test_a_task_in_the_current_directory_is_found(here: Path) -> None:
    (here / "own_package").mkdir()
    (here / "own_package" / "own_tasks.py").write_text(MODULE)
    task = load_task("own_package.own_tasks:build")(TrainConfig(seed=5))
    assert isinstance(task, Task)
    assert task.train_data[0] == 5


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("own_missing:build", "there is no module 'own_missing'"),
        ("own_tasks:bild", "no function 'bild'. Did you mean own_tasks:build?"),
        ("own_tasks:torch", "no function 'torch'"),
        ("own_needy:build", "there is no module 'own_requirement'"),
        (":build", "package.module:function"),
        ("own_tasks:", "package.module:function"),
        (".own_tasks:build", "package.module:function"),
    ],
)
def test_what_cannot_be_found_is_named(here: Path, spec: str, problem: str) -> None:
    (here / "own_tasks.py").write_text(MODULE)
    (here / "own_needy.py").write_text("import own_requirement")
    with pytest.raises(ConfigError, match=problem):
        load_task(spec)


def test_a_function_that_returns_no_task_is_refused(here: Path) -> None:
    (here / "own_tasks.py").write_text(MODULE)
    with pytest.raises(ConfigError, match="returned dict"):
        load_task("own_tasks:build_nothing")(TrainConfig())


def test_cross_entropy_sums_over_targets_that_are_not_padding() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([[0, 1, -100], [4, -100, -100]])
    loss = cross_entropy(logits, targets)
    log_p = logits.detach().log_softmax(-1)
    expected = -(log_p[0, 0, 0] + log_p[0, 1, 1] + log_p[1, 0, 4])
    assert torch.allclose(loss.total.double(), expected, rtol=1e-6, atol=0)
    right = (logits.argmax(-1) == targets).sum()
    assert (loss.count.item(), loss.correct.item()) == (3, right.item())
    assert loss.total.requires_grad
    assert not loss.correct.requires_grad


def test_half_precision_logits_are_summed_in_float32() -> None:
    loss = cross_entropy(torch.zeros(70_000, 2, dtype=torch.float16), torch.zeros(70_000, dtype=torch.int64))
    assert loss.total.dtype == torch.float32
    assert loss.total.item() == pytest.approx(70_000 * 0.693147, rel=1e-5)
