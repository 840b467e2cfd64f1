"""Side processes that take their share: beside busy cores one that gives way takes a minute to start."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from harness.tracking import mirrors

__all__ = ["let_it_take_its_share", "side_processes_of"]


def let_it_take_its_share(monkeypatch: pytest.MonkeyPatch, starter: ModuleType = mirrors) -> None:
    """Those that a module of this process starts from now on have its own priority."""
    started = starter.start_helper

    def start(*arguments: Any, **keywords: Any) -> Any:
        return started(*arguments, **{**keywords, "yields": False})

    monkeypatch.setattr(starter, "start_helper", start)


def side_processes_of(run_dir: Path) -> list[psutil.Process]:
    """Those that still write mirrors or the picture of a run: its trainer does not wait for them."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "harness.tracking.side" in words and str(run_dir.resolve()) in words:
            found.append(process)
    return found
