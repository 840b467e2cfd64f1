"""Takes off what other packages wrap around modules: a compiled module, wrappers in names of parameters."""

from __future__ import annotations

import re
from typing import TypeVar

__all__ = ["uncompiled", "without_wrappers"]

Module = TypeVar("Module")

_WRAPPERS = re.compile(r"(?:(?<=\.)|\A)(?:_orig_mod|_checkpoint_wrapped_module)\.")
"""What torch.compile and activation checkpointing put into names; no model has children of these names."""


def without_wrappers(name: str) -> str:
    """The name as the model's author knows it: without torch.compile and activation checkpointing."""
    return _WRAPPERS.sub("", name)


def uncompiled(module: Module) -> Module:
    """The module that was given to `torch.compile`; any other itself. `Module.compile()` wraps nothing."""
    inner: Module = getattr(module, "_orig_mod", module)
    return inner
