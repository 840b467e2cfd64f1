"""Values from rank 0 to the others through the process group's store: rank 0 never waits for anybody.

So one may be set where nobody asks for it, unlike a collective, which every rank has to enter.
"""

from __future__ import annotations

import datetime
from typing import Any

import torch.distributed

__all__ = ["default_store", "has_group", "set_from_main", "wait_for_main"]


def has_group() -> bool:
    """Whether this process has joined a process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def set_from_main(key: str, value: str) -> None:
    """On rank 0: what the others will find under `key`. Does nothing without a process group."""
    store = default_store()
    if store is not None:
        store.set(key, value)


def wait_for_main(key: str, *, timeout_s: float) -> str | None:
    """On another rank: waits for what rank 0 sets; None if it sets nothing, or there is no group."""
    store = default_store()
    if store is None:
        return None
    try:
        store.wait([key], datetime.timedelta(seconds=timeout_s))
    except RuntimeError:  # torch.distributed.DistStoreError is one; so is a store whose host is gone
        return None
    value: bytes = store.get(key)
    return value.decode()


def default_store() -> Any:
    """The store through which the ranks of the default process group met; None without a group."""
    return torch.distributed.distributed_c10d._get_default_store() if has_group() else None
