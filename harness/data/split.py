"""Which data is held out: a function of its content, never of its name or order."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection

import xxhash

__all__ = ["content_rank", "val_limit"]


def content_rank(content: bytes) -> float:
    """A hash of `content`, evenly spread over [0, 1]."""
    return xxhash.xxh3_64_intdigest(content) / 2**64


def val_limit(ranks: Collection[float], val_frac: float) -> float | None:
    """What ranks below this is held out: `val_frac`, moved by one rank where a part would be empty.

    None: all ranks are the same, so that there is nothing to tell apart.
    """
    distinct = sorted(set(ranks))
    if len(distinct) < 2:
        return None
    return distinct[min(max(bisect_left(distinct, val_frac), 1), len(distinct) - 1)]
