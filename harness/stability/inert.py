"""What the guard hangs on a user's model stays behind when the model is copied or pickled.

A copy is not guarded, and a file that was made of it must not need this package to be read.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import torch

from harness.errors import ConfigError

__all__ = ["ForwardHook", "Hook"]


class Hook:
    """A hook for a module that calls a method as long as the method's object lives.

    A copy or a pickle of the module has a hook there that does nothing.
    """

    def __init__(self, method: Callable[..., None]) -> None:
        self._method = weakref.WeakMethod(method)

    def __call__(self, *args: Any) -> None:
        method = self._method()
        if method is not None:
            method(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        # Takes anything, does nothing, and is part of Python.
        return getattr, (contextlib.nullcontext(), "__exit__")


class ForwardHook(Hook):
    """One for forward passes: of a model that is compiled with it, it does nothing, and is compiled away.

    Nor does it say anything of a model that is traced.
    """

    __name__ = "harness_forward_hook"

    @property
    def __globals__(self) -> dict[str, Any]:
        # What torch.jit.script asks of every hook, before it fails in words that name no model.
        raise ConfigError(
            "torch.jit.script was given a model that is guarded",
            rule="it compiles a model's hooks too, and cannot compile the guard's",
            remedy='script the model before it is guarded, after guard.close(), or guard with checks="off"',
        )

    def __call__(self, *args: Any) -> None:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
            return
        method = self._method()  # not super().__call__: torch.compile cannot trace it
        if method is not None:
            method(*args)
