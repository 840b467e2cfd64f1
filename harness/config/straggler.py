"""The section `straggler`."""

from __future__ import annotations

from dataclasses import dataclass

from harness.config.checks import require, require_positive

__all__ = ["StragglerConfig"]


@dataclass(frozen=True, kw_only=True)
class StragglerConfig:
    """When a rank that computes more slowly than the others, or waits longer for its data, is an incident."""

    SECTION = "straggler"

    enabled: bool = True
    """Compare the ranks' own computing times, which travel with each step anyway."""
    below_frac: float = 0.75
    """A rank with less than this share of the first one's speed, batch and computing together, is late."""
    window_s: float = 60.0
    """It has to be so for so many seconds of steps, in most of them."""

    def __post_init__(self) -> None:
        require(self, "below_frac", 0 < self.below_frac < 1, "it has to lie between 0 and 1")
        require_positive(self, "window_s")
