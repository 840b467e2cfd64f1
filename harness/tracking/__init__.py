"""One append-only log per run is the truth; TensorBoard and Weights & Biases are mirrors of it.

The names are loaded when they are first used: the side process imports this package and must start fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.tracking.log import RunLog
    from harness.tracking.mirrors import MirrorHandle, start_mirrors, start_sampler
    from harness.tracking.plots import plot_run
    from harness.tracking.reader import Run, open_run
    from harness.tracking.settings import MirrorSettings

__all__ = [
    "MirrorHandle",
    "MirrorSettings",
    "Run",
    "RunLog",
    "open_run",
    "plot_run",
    "start_mirrors",
    "start_sampler",
]

_HOMES = {
    "MirrorHandle": "mirrors",
    "MirrorSettings": "settings",
    "Run": "reader",
    "RunLog": "log",
    "open_run": "reader",
    "plot_run": "plots",
    "start_mirrors": "mirrors",
    "start_sampler": "mirrors",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
