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
    from harness.training import TrainResult, train

__version__ = "0.1.0"

__all__ = ["Checkpointer", "StepGuard", "StepRecord", "TrainConfig", "TrainResult", "train"]

_HOMES = {
    "Checkpointer": "harness.checkpoint",
    "StepGuard": "harness.stability",
    "StepRecord": "harness.records",
    "TrainConfig": "harness.config",
    "TrainResult": "harness.training",
    "train": "harness.training",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
