"""Linear layers in float8, emulated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from harness.cli.train import run as run_program
from harness.errors import ConfigError
from harness.runlog.reader import open_run
from harness.training.float8 import use_float8
from tests.support.runs import tiny

pytest.importorskip("torchao", reason="torchao is not installed")


def test_a_run_in_float8_learns_and_resumes_bitwise(tmp_path: Path) -> None:
    def losses(name: str, *steps: int) -> list[float]:
        for last in steps:
            arguments = ("--loop.float8", f"--name={name}", f"--loop.steps={last}", "--schedule.steps=8")
            assert run_program(tiny(tmp_path, *arguments)) == 0
        return list(open_run(tmp_path / "runs" / name).scalars("train/loss").values)

    whole = losses("whole", 8)
    assert whole[-1] < whole[0]
    assert losses("parts", 4, 8) == whole
    assert run_program(tiny(tmp_path, "--name=fp32", "--loop.steps=8")) == 0
    assert list(open_run(tmp_path / "runs" / "fp32").scalars("train/loss").values) != whole


def test_the_head_and_what_does_not_fit_stay_as_they_are() -> None:
    blocks = nn.ModuleList([nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 20))])
    model = nn.ModuleDict({"blocks": blocks, "head": nn.Linear(32, 64)})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    use_float8(model, torch.device("cpu"))
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert kinds["blocks.0.0"] == "Float8Linear"
    assert (kinds["blocks.0.1"], kinds["head"]) == ("Linear", "Linear")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ConfigError, match="no layer of the model is fit"):
        use_float8(nn.Linear(32, 32), torch.device("cpu"))
