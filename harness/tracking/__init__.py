"""One append-only log per run is the truth; TensorBoard and Weights & Biases are mirrors of it.

The names are loaded when they are first used: the side process imports this package and must start fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.runlog.reader import Run, open_run
    from harness.runlog.writer import RunLog
    from harness.tracking.experiment import ExperimentConfig, TrainingMetrics
    from harness.tracking.mirrors import MirrorHandle, start_mirrors, start_sampler
    from harness.tracking.plots import plot_run
    from harness.tracking.settings import MirrorSettings
    from harness.tracking.sync import sync_run
    from harness.tracking.tracker_checkpoints import ExperimentTracker

__all__ = [
    "ExperimentConfig",
    "ExperimentTracker",
    "MirrorHandle",
    "MirrorSettings",
    "Run",
    "RunLog",
    "TrainingMetrics",
    "open_run",
    "plot_run",
    "start_mirrors",
    "start_sampler",
    "sync_run",
]

_HOMES = {
    "ExperimentConfig": "harness.tracking.experiment",
    "ExperimentTracker": "harness.tracking.tracker_checkpoints",
    "MirrorHandle": "harness.tracking.mirrors",
    "MirrorSettings": "harness.tracking.settings",
    "Run": "harness.runlog.reader",
    "RunLog": "harness.runlog.writer",
    "TrainingMetrics": "harness.tracking.experiment",
    "open_run": "harness.runlog.reader",
    "plot_run": "harness.tracking.plots",
    "start_mirrors": "harness.tracking.mirrors",
    "start_sampler": "harness.tracking.mirrors",
    "sync_run": "harness.tracking.sync",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
