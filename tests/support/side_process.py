"""Side processes that take their share: beside busy cores one that gives way takes a minute to start."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from harness.tracking import mirrors

__all__ = ["let_it_take_its_share"]


def let_it_take_its_share(monkeypatch: pytest.MonkeyPatch, starter: ModuleType = mirrors) -> None:
    """Those that a module of this process starts from now on have its own priority."""
    started = starter.start_helper

    def start(*arguments: Any, **keywords: Any) -> Any:
        return started(*arguments, **{**keywords, "yields": False})

    monkeypatch.setattr(starter, "start_helper", start)
