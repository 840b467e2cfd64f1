"""The trainer and a tracker in a loop of one's own write the same names, so that every viewer shows both."""

from __future__ import annotations

from pathlib import Path

import torch

from harness.config import TrainConfig
from harness.data import Task
from harness.runlog.names import EventName, Metric
from harness.runlog.reader import Run, open_run
from harness.tracking import ExperimentConfig, ExperimentTracker, TrainingMetrics
from harness.training.journal import MainJournal
from tests.support.own_tasks import own_config, points_task, run_loop


def points(config: TrainConfig) -> Task:
    return points_task()


def details(run: Run, name: str) -> set[str]:
    (event, *_) = run.events(name)
    return set(event.details)


def test_a_step_an_evaluation_and_a_checkpoint_have_the_same_fields_in_both_logs(tmp_path: Path) -> None:
    trained = run_loop(own_config(tmp_path, points, "--loop.eval_every=3", "--checkpoint.every=3"))
    assert isinstance(trained.journal, MainJournal)
    trainers = open_run(trained.directory)
    settings = ExperimentConfig.basic(
        run_name="mine",
        enable_tensorboard=False,
        tensorboard_dir=str(tmp_path / "loops"),
        model_save_dir=str(tmp_path / "models"),
        config_save_dir=str(tmp_path / "configs"),
    )
    with ExperimentTracker(settings, rank=0) as tracker:
        assert type(trained.journal._log) is type(tracker._output._log)  # one Recorder
        tracker.log_training_step(
            TrainingMetrics(
                loss=1.0,
                accuracy=0.5,
                learning_rate=0.1,
                gradient_norm=2.0,
                clipping_threshold=1.0,
                training_time=0.1,
            )
        )
        tracker.log_metrics_batch({"val": {"loss": 1.0}})
        tracker.save_checkpoint(torch.nn.Linear(2, 1))
        directory = tracker.run_dir
    trackers = open_run(directory)
    # A loop of one's own knows less, and whether it clipped where the trainer knows by how much.
    own = {Metric.CLIPPED, Metric.CLIP_THRESHOLD}
    assert set(trackers.names()) - own <= set(trainers.names())
    assert {Metric.TRAIN_LOSS, Metric.LR, Metric.STEP_S, Metric.GRAD_NORM_CLIPPED, Metric.VAL_LOSS} <= set(
        trackers.names()
    )
    saved = details(trackers, EventName.CHECKPOINT), details(trainers, EventName.CHECKPOINT)
    assert saved[0] - {"epoch"} == saved[1] >= {"num_steps", "size_bytes", "blocked_s", "seconds"}
