"""What a task's code raises is said once, with its author's own lines, on whichever ranks it fails."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from harness.cli.train import run
from tests.support.launch import launch
from tests.support.runs import tiny

TASK = """
import os
import torch
from harness.data import LossSum, Task

class Points:
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return {"x": torch.full((4,), index / 40)}

STEPS = []

def fails():
    return os.environ.get("FAILS", "01")

def loss(model, batch):
    if model.training:
        STEPS.append(1)
    if len(STEPS) > 3 and os.environ.get("RANK", "0") in fails():
        scaled = batch["x"] * batch["weights"]
    return LossSum(model(batch["x"]).square().sum(), len(batch["x"]))

def build(config):
    return Task(model=torch.nn.Linear(4, 1), loss=loss, train_data=Points(), val_data=Points())
"""


def arguments(tmp_path: Path) -> list[str]:
    (tmp_path / "mine.py").write_text(TASK)
    return tiny(tmp_path, "--task=mine:build", "--tracking.alerts=[]", "--loop.eval_every=0")


def complaint_in(output: str) -> list[str]:
    """The one complaint and the lines that belong to it."""
    lines = output.splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("TaskError")]
    assert len(starts) == 1, output
    return lines[starts[0] : starts[0] + 3]


def assert_says_what_and_where(lines: list[str], tmp_path: Path) -> None:
    assert "the loss loss raised KeyError: 'weights'" in lines[0]
    assert lines[1].strip().startswith(f'File "{tmp_path / "mine.py"}", line ')
    assert lines[1].endswith("in loss")
    assert lines[2].strip() == 'scaled = batch["x"] * batch["weights"]'


def test_one_process_says_it_in_its_authors_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    assert run(arguments(tmp_path)) == 2
    output = capsys.readouterr().err
    lines = complaint_in(output)
    assert lines[0].startswith("TaskError: ")
    assert_says_what_and_where(lines, tmp_path)
    assert "Traceback" not in output


@pytest.mark.parametrize(("fails", "where"), [("01", ""), ("1", " on rank 1")])
def test_two_processes_say_it_once(fails: str, where: str, tmp_path: Path) -> None:
    code, output = launch(arguments(tmp_path), cwd=tmp_path, FAILS=fails)
    assert code != 0
    lines = complaint_in(output)
    assert lines[0].startswith(f"TaskError{where}: ")
    assert_says_what_and_where(lines, tmp_path)
    assert "Traceback" not in output
