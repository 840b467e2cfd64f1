"""docs/experiment-tracking.md is a program: its blocks run in their order, as they stand."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from harness.experiment_tracking import ExperimentConfig, TrainingMetrics
from harness.tracking import open_run
from tests.support.runs import ROOT

PAGE = (ROOT / "docs" / "experiment-tracking.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))


@pytest.fixture
def _no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `tensorboard` that notes what it is asked to show: the real one would serve for ever."""
    program = tmp_path / "bin" / "tensorboard"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "$@" > asked\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")


def users_own() -> dict[str, Any]:
    """What the page leaves to its reader."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return {
        "torch": torch,
        "logger": logging.getLogger("mine"),
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2),
        "criterion": torch.nn.functional.cross_entropy,
        "train_loader": [(torch.randn(5, 4), torch.randint(3, (5,))) for _ in range(2)],
        "num_epochs": 11,
        "calculate_accuracy": lambda output, target: (output.argmax(1) == target).float().mean(),
        "count_nans": lambda model: sum(p.grad.isnan().sum() for p in model.parameters()),
        "count_infs": lambda model: sum(p.grad.isinf().sum() for p in model.parameters()),
        "get_memory_usage": lambda: 0.5,
        "get_gpu_utilization": lambda: 0.1,
        "images": torch.rand(2, 3, 8, 8),
        "epoch_loss": 1.0,
        "epoch_accuracy": 0.5,
        "nan_count": 0,
        "step": 1000,
        "value": 1.0,
        "value1": 2.0,
        "value2": 3.0,
    }


@pytest.mark.usefixtures("_no_server")
def test_the_page_runs_as_it_stands(caplog: pytest.LogCaptureFixture) -> None:
    names = users_own()
    for number, block in enumerate(blocks("python")):
        exec(compile(block, f"block {number}", "exec"), names)
    assert (names["epoch"], names["step"]) == (10, 1000)
    run = open_run("runs/classifier")
    assert run.state() == "finished"
    assert run.scalars("train/loss").steps.tolist() == [*range(26)]
    assert run.scalars("epoch/epoch_loss").steps.tolist() == [*range(1, 22, 2)]
    assert run.scalars("custom_metric").steps.tolist() == [1000]
    assert {"histogram", "image", "text"} <= set(run.records)
    assert len(run.events("checkpoint")) == 2
    errors = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
    assert ["log_training_step leaves out 'loss'" in message for message in errors] == [True]
    assert Path("training_progress.png").stat().st_size > 10_000
    assert Path("asked").read_text().split() == ["--logdir=runs/tensorboard", "--port=6006"]
    shown = EventAccumulator("runs/tensorboard/classifier").Reload()
    assert len(shown.Scalars("train/loss")) == 26


@pytest.mark.parametrize("kind", [ExperimentConfig, TrainingMetrics])
def test_the_page_shows_every_setting_and_every_field_with_its_default(kind: type) -> None:
    calls = re.findall(rf" = ({kind.__name__}\(\n.*?\n\))", PAGE, re.DOTALL)
    complete = max(calls, key=len)
    given = set(re.findall(r"^    (\w+)=", complete, re.MULTILINE))
    assert given == {each.name for each in dataclasses.fields(kind)}
    assert eval(complete, {kind.__name__: kind}) == kind()


def program(block: str) -> Path:
    """The file of the module that a block of the page starts."""
    [module] = re.findall(r"^python -m (harness\.\w+)$", block, re.MULTILINE)
    return ROOT.joinpath(*module.split(".")).with_suffix(".py")


def test_the_complete_example_learns_and_leaves_everything(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(program(blocks("bash")[0])), run_name="__main__")
    assert "`harness show example_usage-" in capsys.readouterr().out
    [directory] = Path("runs").glob("example_usage-*")
    run = open_run(directory)
    losses = run.scalars("train/loss").values
    assert len(losses) == 75
    assert losses[-15:].mean() < 0.6 * math.log(3)  # of chance, between three classes
    assert len(run.events("checkpoint")) == 5
    assert {"histogram", "image", "graph"} <= set(run.records)


def test_the_dashboards_command_is_that_of_the_page(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The test of the wheel opens it for real."""
    monkeypatch.setattr(sys, "argv", ["gradio_experiment_tracking.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(program(blocks("bash")[1])), run_name="__main__")
    assert "usage: harness dashboard" in capsys.readouterr().out
