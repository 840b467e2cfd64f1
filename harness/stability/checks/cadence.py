"""When checks for silent errors look: after the first step, after the first ten, then every `LOOK_EVERY`."""

from __future__ import annotations

__all__ = ["FIRST_STEPS", "LOOK_EVERY", "is_look", "is_window_end"]

LOOK_EVERY = 11
"""Steps. Odd, because an even cadence misses an error of period two."""

FIRST_STEPS = LOOK_EVERY - 1
"""Steps after which the first look has something to look at."""

WINDOW_LOOKS = 9
"""Looks from one end of a window to the next: what has to be seen to happen at least once in it."""


def is_look(step: int) -> bool:
    """Whether what the hosts have found is sent with `step`."""
    return step == 0 or (step + 2) % LOOK_EVERY == 0


def is_window_end(step: int) -> bool:
    """Whether a window of steps ends with `step`: the first ones, then `LOOK_EVERY * WINDOW_LOOKS` each."""
    return (step + 2) % LOOK_EVERY == 0 and (step + 2) // LOOK_EVERY % WINDOW_LOOKS == 1
