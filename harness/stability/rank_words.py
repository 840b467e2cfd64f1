"""Ranks in words."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["on_ranks"]

SHOWN = 8


def on_ranks(ranks: Sequence[int], num_ranks: int) -> str:
    """` on rank 1`, ` on ranks 1, 3`; nothing where it is all of them."""
    if len(ranks) == num_ranks:
        return ""
    more = f" and {len(ranks) - SHOWN} more" if len(ranks) > SHOWN else ""
    return f" on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:SHOWN]))}{more}"
