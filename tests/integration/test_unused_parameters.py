"""A model with a parameter that its loss does not depend on, as its author meets it: in a whole program."""

from pathlib import Path

import pytest

from harness.runlog.reader import open_run
from tests.support.launch import launch
from tests.support.runs import tiny

TASK = """
import torch
from torch import nn
import torch.distributed as dist
from harness.data import LossSum, Task

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(4, 1), nn.Linear(4, 1)
    def forward(self, x):
        return self.used(x) if dist.get_rank() == 1 else self.used(x) + self.spare(x)

class Data:
    def __len__(self):
        return 64
    def __getitem__(self, index):
        return {"x": torch.full((4,), index / 64)}

def loss(model, batch):
    return LossSum(model(batch["x"]).square().sum(), torch.tensor(len(batch["x"])), torch.tensor(0))

def build(config):
    return Task(model=Model(), loss=loss, train_data=Data(), val_data=Data())
"""


@pytest.mark.slow
def test_an_unused_parameter_of_one_rank_ends_the_run_by_name_and_find_unused_trains_it(
    tmp_path: Path,
) -> None:
    (tmp_path / "own_task.py").write_text(TASK)
    arguments = tiny(tmp_path, "--task=own_task:build", "--checkpoint.every=0", "--loop.eval_every=0")
    path = f"{tmp_path}:{Path(__file__).parents[2]}"
    code, output = launch(arguments, PYTHONPATH=path)
    assert code != 0
    said = "ConfigError: the loss does not depend on spare.weight, spare.bias on rank 1: DDP reduces"
    assert output.count(said) == 1, output
    assert "--parallel.find_unused true" in output
    code, output = launch([*arguments, "--parallel.find_unused"], PYTHONPATH=path)
    assert code == 0, output
    assert open_run(tmp_path / "runs/tiny").last_step == 11
