"""A word of rank 0 to the others through the process group's store: rank 0 never waits for anybody.

So it may be left where nobody asks for it, unlike a collective, which every rank has to enter.
"""

from __future__ import annotations

import datetime
from typing import Any

import torch.distributed

__all__ = ["default_store", "has_group", "leave_word", "word_of_main"]


def has_group() -> bool:
    """Whether this process has joined a process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def leave_word(key: str, word: str) -> None:
    """On rank 0: what the others will find under `key`. Does nothing without a process group."""
    store = default_store()
    if store is not None:
        store.set(key, word)


def word_of_main(key: str, *, timeout_s: float) -> str | None:
    """On another rank: waits for what rank 0 leaves; None if it leaves nothing, or there is no group."""
    store = default_store()
    if store is None:
        return None
    try:
        store.wait([key], datetime.timedelta(seconds=timeout_s))
    except RuntimeError:  # torch.distributed.DistStoreError is one; so is a store whose host is gone
        return None
    word: bytes = store.get(key)
    return word.decode()


def default_store() -> Any:
    """The store through which the ranks of the default process group met; None without a group."""
    return torch.distributed.distributed_c10d._get_default_store() if has_group() else None
