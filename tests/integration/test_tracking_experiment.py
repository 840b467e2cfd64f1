"""The tracker for loops of one's own: snippets as they stand, all it promises, nothing it may break."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from harness import ExperimentTracker
from harness.errors import CheckpointError, TrackingError
from harness.tracking import ExperimentConfig, TrainingMetrics, open_run
from harness.tracking.tracker import ExperimentTracker as BareTracker
from tests.support.wandb_offline import history

QUICK_START = """
from harness.tracking import ExperimentTracker, ExperimentConfig

config = ExperimentConfig(
    experiment_name="my_experiment",
    project_name="numerical_stability_research",
    enable_tensorboard=True,
    enable_wandb=True
)
tracker = ExperimentTracker(config)
tracker.log_hyperparameters({
    'learning_rate': 0.001,
    'batch_size': 32,
    'max_grad_norm': 1.0
})
tracker.log_training_step(
    loss=0.5,
    accuracy=0.85,
    gradient_norm=0.8,
    nan_count=0,
    inf_count=0
)
tracker.close()
"""

TRAINING_LOOP = """
for epoch in range(num_epochs):
    for batch_idx, (data, target) in enumerate(train_loader):
        output = model(data)
        loss = criterion(output, target)
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        tracker.log_training_step(
            loss=loss.item(),
            accuracy=calculate_accuracy(output, target),
            gradient_norm=grad_norm,
            nan_count=count_nans(model),
            inf_count=count_infs(model)
        )
        optimizer.step()
        optimizer.zero_grad()
    tracker.log_epoch(epoch, {
        'epoch_loss': epoch_loss,
        'epoch_accuracy': epoch_accuracy
    })
"""


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))


def plain(**changes: Any) -> ExperimentConfig:
    """No mirrors: what is tested is the log."""
    return ExperimentConfig(**{"enable_tensorboard": False, "enable_wandb": False, **changes})


def small_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))


def only_run() -> Path:
    [run_dir] = [path for path in Path("runs").iterdir() if path.name != "tensorboard"]
    return run_dir


def test_the_quick_start_runs_as_it_stands_offline_and_says_so_once(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import logging; logging.basicConfig()\n" + QUICK_START],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.count("is kept offline in") == 1
    run_dir = only_run()
    assert open_run(run_dir).state() == "finished"
    assert open_run(run_dir).hparams == {"learning_rate": 0.001, "batch_size": 32, "max_grad_norm": 1.0}
    shown = EventAccumulator(str(Path("runs/tensorboard") / run_dir.name)).Reload()
    assert [(e.step, e.value) for e in shown.Scalars("train/loss")] == [(0, 0.5)]
    [row] = [row for row in history(run_dir) if "train/loss" in row]
    assert (row["train/accuracy"], row["train/grad_norm"], row["guard/num_nan"]) == (0.85, 0.8, 0)


def test_the_training_loop_runs_as_it_stands() -> None:
    model = small_model()
    data = [(torch.randn(5, 4), torch.randint(3, (5,))) for _ in range(4)]
    with ExperimentTracker(plain()) as tracker:
        names: dict[str, Any] = {
            "torch": torch,
            "num_epochs": 2,
            "train_loader": data,
            "model": model,
            "criterion": torch.nn.functional.cross_entropy,
            "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
            "calculate_accuracy": lambda out, target: (out.argmax(1) == target).float().mean(),
            "count_nans": lambda m: sum(p.grad.isnan().sum() for p in m.parameters()),
            "count_infs": lambda m: sum(p.grad.isinf().sum() for p in m.parameters()),
            "tracker": tracker,
            "epoch_loss": 1.0,
            "epoch_accuracy": 0.5,
        }
        exec(TRAINING_LOOP, names)
    run = open_run(only_run())
    assert run.scalars("train/loss").steps.tolist() == list(range(8))
    assert run.scalars("epoch/epoch_accuracy").steps.tolist() == [3, 7]
    assert run.scalars("epoch").values.tolist() == [0.0, 1.0]
    assert np.all(run.scalars("train/grad_norm").values > 0)


def test_every_field_of_the_description_is_there_with_its_default() -> None:
    defaults = dataclasses.asdict(ExperimentConfig())
    assert defaults == {
        "experiment_name": "gradient_clipping_nan_handling",
        "project_name": "harness",
        "run_name": None,
        "tags": [],
        "notes": "",
        "enable_tensorboard": True,
        "enable_wandb": True,
        "log_interval": 100,
        "save_interval": 1000,
        "log_metrics": True,
        "log_hyperparameters": True,
        "log_model_architecture": True,
        "log_gradients": True,
        "log_images": True,
        "log_text": True,
        "tensorboard_dir": "runs/tensorboard",
        "model_save_dir": "models",
        "config_save_dir": "configs",
        "sync_tensorboard": True,
        "resume_run": False,
        "anonymous": False,
        "run_id": None,
        "wandb_group": None,
    }
    assert dataclasses.asdict(TrainingMetrics()) == {
        "loss": 0.0,
        "accuracy": None,
        "learning_rate": None,
        "gradient_norm": None,
        "nan_count": 0,
        "inf_count": 0,
        "clipping_applied": False,
        "clipping_threshold": None,
        "training_time": 0.0,
        "memory_usage": None,
        "gpu_utilization": None,
    }


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_a_configuration_comes_back_from_its_file(suffix: str) -> None:
    config = ExperimentConfig.numerical_stability(notes="üben", tags=["a", "b"], wandb_group="g")
    with ExperimentTracker(
        dataclasses.replace(config, enable_tensorboard=False, enable_wandb=False)
    ) as tracker:
        path = tracker.save_config(f"final.{suffix}")
        assert path == Path("configs") / f"final.{suffix}"
        assert ExperimentConfig.from_file(path) == tracker.config


def test_a_wrong_configuration_file_is_one_clear_error() -> None:
    Path("c.json").write_text(json.dumps({"experimentname": "x"}))
    with pytest.raises(TrackingError, match="did you mean 'experiment_name'"):
        ExperimentConfig.from_file("c.json")
    Path("c.yaml").write_text("a: [1")
    with pytest.raises(TrackingError, match="cannot be read"):
        ExperimentConfig.from_file("c.yaml")
    with pytest.raises(TrackingError, match="cannot be read"):
        ExperimentConfig.from_file("gone.json")


def test_the_presets_differ_as_they_say() -> None:
    assert not ExperimentConfig.basic().enable_wandb
    assert ExperimentConfig.full().enable_wandb
    assert ExperimentConfig.numerical_stability(log_interval=5).log_interval == 5


def test_metrics_come_as_an_object_as_names_or_through_the_queue_and_more_are_welcome() -> None:
    with ExperimentTracker(plain()) as tracker:
        tracker.log_training_step(TrainingMetrics(loss=1.0, gradient_norm=4.0, clipping_threshold=2.0))
        tracker.log_training_step(loss=2.0, learning_rate=0.1, perplexity=7.4)
        tracker.metrics_queue.put(TrainingMetrics(loss=3.0, memory_usage=0.5))
        tracker.log_custom_metric("mine", 5, step=1)
        tracker.log_metrics_batch({"a": 1, "b/c": None})
    run = open_run(only_run())
    assert run.scalars("train/loss").values.tolist() == [1.0, 2.0, 3.0]
    assert run.scalars("train/grad_norm_clipped").values.tolist() == [2.0]
    assert run.scalars("train/perplexity").steps.tolist() == [1]
    assert run.scalars("mine").steps.tolist() == [1]
    assert run.scalars("a").steps.tolist() == [2]
    assert run.scalars("system/memory_usage").values.tolist() == [0.5]
    assert "b/c" not in run.names()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.tensor(0.5), 0.5),
        (np.float32(0.5), 0.5),
        (Decimal("0.5"), 0.5),
        (torch.tensor(math.inf, dtype=torch.bfloat16), math.inf),
        (torch.tensor([0.5], requires_grad=True), 0.5),
        (np.array([[0.5]]), 0.5),
        (True, 1.0),
    ],
)
def test_numbers_of_any_kind_are_metrics(value: Any, expected: float) -> None:
    with ExperimentTracker(plain()) as tracker:
        tracker.log_training_step(loss=value)
    assert open_run(only_run()).scalars("train/loss").values.tolist() == [expected]


@pytest.mark.parametrize(
    "value", ["0.5", [1.0], torch.zeros(3), object(), torch.empty(0), torch.tensor([1j])]
)
def test_what_is_no_number_is_said_and_costs_only_itself(
    value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with ExperimentTracker(plain()) as tracker:
        tracker.log_training_step(loss=value)
        tracker.log_training_step(loss=1.0)
    assert "log_training_step leaves out 'loss'" in caplog.text
    assert open_run(only_run()).scalars("train/loss").steps.tolist() == [1]


def test_everything_else_that_can_be_logged() -> None:
    model = small_model()
    model(torch.randn(2, 4)).sum().backward()
    with ExperimentTracker(plain(enable_tensorboard=True, notes="why")) as tracker:
        tracker.log_model_architecture(model, torch.zeros(1, 4))
        tracker.log_gradients(model)
        tracker.log_images("noise", torch.rand(2, 3, 4, 4))
        tracker.log_images({"x": np.zeros((2, 2)), "y": np.zeros((2, 2))}, step=3)
        tracker.log_text("remark", "**bold**")
        tracker.log_event("incident", step=2, rank=0)
    run = open_run(only_run())
    assert (run.info["model"], run.info["num_parameters"]) == ("Sequential", 67)
    [histogram] = run.records["histogram"]
    assert {"gradients/0.weight", "parameters/2.bias"} <= set(histogram.values)
    assert histogram.values["gradients/0.weight"]["num"] == 32
    assert [e.details for e in run.events("incident")] == [{"rank": 0}]
    tags = EventAccumulator(str(Path("runs/tensorboard") / only_run().name)).Reload().Tags()
    assert tags["graph"] is True
    assert set(tags["images"]) == {"noise", "x", "y"}
    assert {"model/architecture", "remark", "notes"} <= set(tags["tensors"])
    assert model.training


def test_what_is_switched_off_is_not_logged() -> None:
    off = {name: False for name in dataclasses.asdict(ExperimentConfig()) if name.startswith("log_")}
    off.pop("log_interval")
    model = small_model()
    with ExperimentTracker(plain(**off)) as tracker:
        tracker.log_training_step(loss=1.0)
        tracker.log_hyperparameters({"a": 1})
        tracker.log_model_architecture(model)
        tracker.log_gradients(model)
        tracker.log_images("x", np.zeros((2, 2)))
        tracker.log_text("a", "b")
    run = open_run(only_run())
    assert (run.names(), run.hparams, run.records) == ([], {}, {})


def test_a_visualization_is_a_figure_a_file_and_a_logged_image() -> None:
    with ExperimentTracker(plain()) as tracker:
        for step in range(5):
            tracker.log_training_step(loss=1.0 / (step + 1), accuracy=0.2 * step, nan_count=step == 3)
        shown = tracker.create_visualization("pictures/progress.png")
        assert isinstance(shown["figure"], matplotlib.figure.Figure)
        assert [axis.get_ylabel() for axis in shown["figure"].axes][:2] == ["loss", "accuracy"]
        assert shown["metrics_summary"]["num_steps"] == 5
        assert shown["metrics_summary"]["num_nonfinite_steps"] == 1
    assert Path("pictures/progress.png").stat().st_size > 10_000
    assert (only_run() / "curves.png").exists()
    assert "visualization" in open_run(only_run()).records["image"][0].values


def test_summary_status_and_resources() -> None:
    with ExperimentTracker(plain(run_name="one")) as tracker:
        tracker.log_training_step(loss=2.0)
        tracker.log_training_step(loss=1.0)
        summary = tracker.get_experiment_summary()
        assert (summary["name"], summary["num_steps"], summary["best_train/loss"]) == ("one", 2, 1.0)
        status = tracker.get_system_status()
        assert (status["logging"], status["mirrors_running"], status["step"]) == (True, True, 2)
        assert tracker.get_resource_usage()["process_ram_gb"] > 0
    assert tracker.get_system_status()["logging"] is False


def test_a_checkpoint_comes_back_bit_for_bit_in_another_process() -> None:
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    for _ in range(3):
        model(torch.randn(2, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    with ExperimentTracker(plain(run_name="one")) as tracker:
        name = tracker.save_checkpoint(
            model=model,
            optimizer=optimizer,
            epoch=10,
            step=1000,
            loss=torch.tensor(0.25),
            metrics=TrainingMetrics(loss=0.25),
            scheduler=scheduler,
        )
    assert name == "checkpoint_epoch_10_step_1000.pt"
    again = ExperimentTracker(plain(run_name="one", resume_run=True))
    data = again.load_checkpoint("checkpoint_epoch_10_step_1000.pt")
    again.close()
    assert (data["epoch"], data["step"], data["loss"], data["metrics"]["loss"]) == (10, 1000, 0.25, 0.25)
    other = small_model()
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=0.5)
    other.load_state_dict(data["model_state_dict"])
    other_optimizer.load_state_dict(data["optimizer_state_dict"])
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(other_optimizer.state_dict(), optimizer.state_dict(), rtol=0, atol=0)
    assert data["scheduler_state_dict"]["last_epoch"] == 3


def test_wrong_checkpoint_names_are_errors() -> None:
    with ExperimentTracker(plain()) as tracker:
        with pytest.raises(TrackingError, match="no checkpoint's name"):
            tracker.load_checkpoint("../../etc/passwd")
        with pytest.raises(CheckpointError):
            tracker.load_checkpoint("checkpoint_epoch_1_step_5.pt")
    with BareTracker(plain()) as bare, pytest.raises(TrackingError, match="no store for checkpoints"):
        bare.save_checkpoint(small_model())


def test_a_run_is_resumed_by_its_name_by_its_wandb_id_or_as_the_newest() -> None:
    with ExperimentTracker(plain(run_name="one", enable_wandb=True, anonymous=True)) as tracker:
        tracker.log_training_step(loss=1.0)
    wandb_id = (only_run() / "log" / "mirrors" / "wandb-run-id").read_text()
    for resume in ({"run_id": "one"}, {"run_id": wandb_id}, {"run_name": "one"}, {}):
        with ExperimentTracker(plain(resume_run=True, **resume)) as tracker:
            tracker.log_training_step(loss=2.0)
    run = open_run(only_run())
    assert run.scalars("train/loss").steps.tolist() == [0, 1, 2, 3, 4]
    assert run.attempts == [0, 1, 2, 3, 4]
    with pytest.raises(TrackingError, match="no run 'gone'"):
        ExperimentTracker(plain(resume_run=True, run_id="gone"))


def test_equal_names_make_different_runs() -> None:
    for _ in range(3):
        ExperimentTracker(plain(run_name="same")).close()
    assert sorted(path.name for path in Path("runs").iterdir()) == ["same", "same-2", "same-3"]


@pytest.mark.parametrize("name", ["../../outside", "/tmp/outside", "a\nb\0c", "x" * 3000])
def test_a_hostile_run_name_stays_in_the_folder_of_runs(name: str, tmp_path: Path) -> None:
    with ExperimentTracker(plain(run_name=name, enable_tensorboard=True)) as tracker:
        tracker.log_training_step(loss=1.0)
    assert tracker.run_dir.resolve().parent == (tmp_path / "runs").resolve()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


def test_other_ranks_write_nothing() -> None:
    with ExperimentTracker(ExperimentConfig(), rank=1) as tracker:
        tracker.log_training_step(loss=1.0)
        tracker.log_text("a", "b")
        assert tracker.get_system_status()["logging"] is False
        assert tracker.get_resource_usage()["cpu_frac"] >= 0
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("ending", "state"),
    [("", "finished"), ("raise SystemExit(3)", "finished"), ("1 / 0", "crashed"), ("os._exit(1)", "crashed")],
)
def test_who_forgets_to_close_still_gets_the_right_end(ending: str, state: str) -> None:
    program = (
        "import os\n"
        "from harness.tracking import ExperimentConfig\n"
        "from harness.tracking.tracker import ExperimentTracker\n"
        "tracker = ExperimentTracker(ExperimentConfig(enable_wandb=False, enable_tensorboard=False))\n"
        f"tracker.log_training_step(loss=1.0)\n{ending}"
    )
    subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert open_run(only_run()).state() == state


def test_the_block_says_how_it_was_left() -> None:
    with pytest.raises(ZeroDivisionError), ExperimentTracker(plain()):
        raise ZeroDivisionError
    assert open_run(only_run()).state() == "crashed"


def train(log: Callable[[int, torch.Tensor], None], num_steps: int = 20) -> list[float]:
    """Losses of a small training that calls `log` at each step."""
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for step in range(num_steps):
        loss = model(torch.randn(8, 4, generator=generator)).square().mean()
        loss.backward()
        log(step, loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_losses_are_the_same_bits_with_every_tracker_broken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The side process is killed, TensorBoard's folder is a file, the disk refuses every second write."""
    bare = train(lambda step, loss: None)
    Path("runs").mkdir()
    Path("runs/tensorboard").write_text("in the way")
    tracker = ExperimentTracker(ExperimentConfig(log_interval=1000))
    write, calls = os.write, [0]

    def refuse_every_second(fd: int, data: bytes) -> int:
        calls[0] += 1
        if calls[0] % 2:
            raise OSError(28, "No space left on device")
        return write(fd, data)

    def log(step: int, loss: torch.Tensor) -> None:
        if step == 5:
            pid = tracker._output._log._mirrors.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
        tracker.log_training_step(loss=loss)
        tracker.log_images("broken", object())

    with caplog.at_level(logging.WARNING), monkeypatch.context() as patch:
        patch.setattr("harness.runlog.segments.os.write", refuse_every_second)
        patch.setattr("harness.runlog.segments.RETRY_S", 0.0)
        assert train(log) == bare
    tracker.close()
    assert open_run(tracker.run_dir).scalars("train/loss").values.tolist() == bare
    assert "No space left on device" in caplog.text
