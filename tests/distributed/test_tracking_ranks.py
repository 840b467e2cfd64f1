"""What the user's description shows, on one process and on two ranks: each makes the tracker, all go on."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from harness.tracking import open_run, recorder
from harness.tracking.mirrors import MirrorHandle
from tests.support.distributed import run_ranks

PROGRAM = """
from harness.tracking import ExperimentTracker, ExperimentConfig, TrainingMetrics
config = ExperimentConfig(
    experiment_name="ablation_study", wandb_group="learning_rate_ablation",
    enable_tensorboard=False, enable_wandb=False, **changes
)
tracker = ExperimentTracker(config)
print(tracker.config)
tracker.log_hyperparameters({'learning_rate': 0.001, 'batch_size': 32, 'max_grad_norm': 1.0})
first = tracker.step
for epoch in range(2):
    for batch_idx in range(3):
        loss = criterion(model(data), target)
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        tracker.log_training_step(
            loss=loss.item(), accuracy=0.5, gradient_norm=grad_norm, nan_count=0, inf_count=0,
            memory_usage=0.5, gpu_utilization=0.1,
        )
        optimizer.step()
        optimizer.zero_grad()
        if tracker.should_save():
            tracker.save_checkpoint(
                model=model, optimizer=optimizer, epoch=epoch, step=tracker.step, loss=loss,
                metrics=TrainingMetrics(loss=loss.item()), scheduler=scheduler,
            )
    tracker.log_epoch(epoch, {'epoch_loss': loss.item(), 'epoch_accuracy': 0.5})
tracker.metrics_queue.put(TrainingMetrics(loss=1.0), block=False)
tracker.log_custom_metric("custom_metric", 1.0, 2)
tracker.log_metrics_batch({"metric1": 1.0, "metric2": 2.0})
tracker.log_gradients(model)
tracker.log_model_architecture(model, data)
tracker.log_images("noise", torch.rand(3, 8, 8))
tracker.log_text("remark", "text")
viz_data = tracker.create_visualization("training_progress.png")
figure = viz_data['figure']
summary = viz_data['metrics_summary']
name = tracker.save_checkpoint(model=model, optimizer=optimizer, epoch=10, step=1000 + first, loss=0.5)
checkpoint_data = tracker.load_checkpoint(name)
plain.load_state_dict(checkpoint_data['model_state_dict'])
optimizer.load_state_dict(checkpoint_data['optimizer_state_dict'])
epoch, step, loss = (checkpoint_data[key] for key in ('epoch', 'step', 'loss'))
summary = tracker.get_experiment_summary()
status = tracker.get_system_status()
resources = tracker.get_resource_usage()
tracker.save_config("final_config.json")
if rank == 0:
    assert ExperimentConfig.from_file("final_config.json") == tracker.config
tracker.close()
"""


def run_description(rank: int, world_size: int, folder: str, changes: dict[str, Any]) -> dict[str, Any]:
    os.chdir(folder)
    recorder.start_mirrors = lambda *_, **__: MirrorHandle(None)  # tested elsewhere
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    model = DistributedDataParallel(plain) if torch.distributed.is_initialized() else plain
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    names: dict[str, Any] = {
        "torch": torch,
        "rank": rank,
        "changes": {"save_interval": 2, "log_images": False, **changes},
        "plain": plain,
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2),
        "criterion": torch.nn.functional.cross_entropy,
        "data": torch.randn(5, 4),
        "target": torch.randint(3, (5,)),
    }
    if rank:
        time.sleep(1.1)  # names with the time in them would differ
    exec(PROGRAM, names)
    kept = ("name", "epoch", "step", "loss", "first")
    answers = {"run_dir": names["status"]["run_dir"], "logging": names["status"]["logging"]}
    return {**{key: names[key] for key in kept}, **answers, "steps": names["tracker"].step}


def test_the_description_runs_on_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recorder, "start_mirrors", recorder.start_mirrors)
    for first in (0, 7):
        changes = {"resume_run": True} if first else {}
        answers = run_description(0, 1, str(tmp_path), changes)
        assert (answers["first"], answers["name"]) == (first, f"checkpoint_epoch_10_step_{1000 + first}.pt")
    assert (answers["epoch"], answers["step"], answers["loss"]) == (10, 1007, 0.5)
    run = open_run(answers["run_dir"])
    assert run.scalars("train/loss").steps.tolist() == list(range(14))
    assert run.scalars("custom_metric").steps.tolist() == [2]
    assert Path("training_progress.png").exists()


def test_the_description_runs_on_two_ranks_that_agree_on_run_and_step(tmp_path: Path) -> None:
    for changes in ({}, {"resume_run": True}):
        first, second = run_ranks(run_description, 2, str(tmp_path), changes, timeout_s=120.0)
        assert (first.pop("logging"), second.pop("logging")) == (True, False)
        assert first == second
    run = open_run(first["run_dir"])
    assert run.scalars("train/loss").steps.tolist() == list(range(14))
    assert len(run.events("checkpoint")) == 8


def make_on_rank_0_alone(rank: int, world_size: int, folder: str) -> int:
    if rank:
        return -1
    from tests.support.trackers import alone

    with alone(Path(folder)) as tracker:
        tracker.log_training_step(loss=1.0)
        return tracker.step


def test_a_tracker_on_rank_0_alone_waits_for_nobody(tmp_path: Path) -> None:
    assert run_ranks(make_on_rank_0_alone, 2, str(tmp_path)) == [1, -1]


def refused_on_rank_0(rank: int, world_size: int, folder: str) -> str:
    from harness.errors import TrackingError
    from tests.support.trackers import alone

    path = Path(folder) / "runs"
    if rank == 0:
        path.write_text("in the way")
    try:
        alone(Path(folder))
    except TrackingError as error:
        return error.problem
    return ""


def test_what_rank_0_cannot_open_is_an_error_on_every_rank(tmp_path: Path) -> None:
    first, second = run_ranks(refused_on_rank_0, 2, str(tmp_path))
    assert first == second
    assert "cannot be made" in first
