"""Experiment trackers without a side process: what is tested is the tracker and its log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness import ExperimentTracker
from harness.tracking import ExperimentConfig, recorder
from harness.tracking.mirrors import MirrorHandle

__all__ = ["alone", "config_in"]


def alone(folder: Path, *, rank: int | None = None, **changes: Any) -> ExperimentTracker:
    """A tracker whose folders lie in `folder`, without mirrors and pictures."""
    start, recorder.start_mirrors = recorder.start_mirrors, lambda *_, **__: MirrorHandle(None)
    try:
        return ExperimentTracker(config_in(folder, **changes), rank=rank)
    finally:
        recorder.start_mirrors = start


def config_in(folder: Path, **changes: Any) -> ExperimentConfig:
    """Settings without mirrors and pictures."""
    places = {
        "tensorboard_dir": str(folder / "runs" / "tensorboard"),
        "model_save_dir": str(folder / "models"),
        "config_save_dir": str(folder / "configs"),
    }
    off = dict.fromkeys(("enable_tensorboard", "enable_wandb", "log_images"), False)
    return ExperimentConfig(**{**places, **off, **changes})
