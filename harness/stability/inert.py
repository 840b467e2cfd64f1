"""What the guard hangs on a user's model stays behind when the model is copied or pickled.

A copy is not guarded, and a file that was made of it must not need this package to be read.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["Hook", "Shadow"]


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


class Shadow:
    """Stands in place of a method of one module; a copy or a pickle of the module has the method itself."""

    def __init__(self, module: nn.Module, name: str, replacement: Callable[..., Any]) -> None:
        self._module, self._name, self._replacement = weakref.ref(module), name, replacement
        setattr(module, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._replacement(*args, **kwargs)

    def remove(self) -> None:
        """Gives the method back. Idempotent."""
        module = self._module()
        if module is not None and module.__dict__.get(self._name) is self:
            delattr(module, self._name)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._module(), self._name)
