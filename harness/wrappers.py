"""Names of parameters and buffers, whatever is wrapped around the modules that hold them."""

from __future__ import annotations

import re

__all__ = ["without_wrappers"]

_WRAPPERS = re.compile(r"(?:(?<=\.)|\A)(?:_orig_mod|_checkpoint_wrapped_module)\.")
"""What torch.compile and activation checkpointing put into names; no model has children of these names."""


def without_wrappers(name: str) -> str:
    """The name as the model's author knows it: without torch.compile and activation checkpointing."""
    return _WRAPPERS.sub("", name)
