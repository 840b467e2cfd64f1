"""What can be changed about a pass: one setting each, for as long as a context lasts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils.deterministic
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["deterministic_algorithms", "eager", "filled", "plain_attention"]


@contextlib.contextmanager
def deterministic_algorithms(*, fill: bool = False) -> Iterator[None]:
    """Deterministic algorithms where there are some."""
    module: Any = torch.utils.deterministic  # mypy does not see what it sets
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    filling = module.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    module.fill_uninitialized_memory = fill
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
        module.fill_uninitialized_memory = filling


def filled() -> contextlib.AbstractContextManager[None]:
    """Within it memory that torch hands out without writing to it holds NaN."""
    return deterministic_algorithms(fill=True)


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Attention by matrix products and a softmax, without a fused kernel."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Compiled modules as they were written."""
    with torch.compiler.set_stance("force_eager"):
        yield
