"""Harness: distributed training that watches the numbers.

The public names are loaded when they are first used, so that `import harness` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.checkpoint import Checkpointer
    from harness.config import TrainConfig
    from harness.records import StepRecord
    from harness.stability import StepGuard
    from harness.tracking import ExperimentConfig, TrainingMetrics
    from harness.tracking.tracker_checkpoints import ExperimentTracker
    from harness.training import Callback, TrainResult, train

__version__ = "0.1.0"

__all__ = [
    "Callback",
    "Checkpointer",
    "ExperimentConfig",
    "ExperimentTracker",
    "StepGuard",
    "StepRecord",
    "TrainConfig",
    "TrainResult",
    "TrainingMetrics",
    "train",
]

_HOMES = {
    "Callback": "harness.training",
    "Checkpointer": "harness.checkpoint",
    "ExperimentConfig": "harness.tracking",
    "ExperimentTracker": "harness.tracking.tracker_checkpoints",
    "StepGuard": "harness.stability",
    "StepRecord": "harness.records",
    "TrainConfig": "harness.config",
    "TrainResult": "harness.training",
    "TrainingMetrics": "harness.tracking",
    "train": "harness.training",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
