"""Signs of life of work that may take hours before the first step, such as preparing data.

A rank that starts has `watchdog.first_s` until the watchdog ends it. Each call of `still_working` begins that
time anew, so that only silence counts.
"""

from __future__ import annotations

__all__ = ["num_signs", "still_working"]

_num_signs = 0


def still_working() -> None:
    """Something has been done, a few records or megabytes. Takes less than a microsecond."""
    global _num_signs
    _num_signs += 1


def num_signs() -> int:
    """How often this process has said so; read by the watchdog's thread."""
    return _num_signs
