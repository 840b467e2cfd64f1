"""The items of `faults`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from harness.config.checks import require_not_negative

__all__ = ["FaultConfig"]


@dataclass(frozen=True, kw_only=True)
class FaultConfig:
    """One rehearsed fault."""

    SECTION = "faults"

    step: int
    """Step at which it strikes, counted from 0."""
    rank: int = 0
    """Rank that it strikes."""
    kind: Literal["nan", "inf", "-inf", "overflow", "spike", "slow", "kill", "hang"] = "nan"
    """A value to inject (overflow: finite, but its square is not; spike: `scale` times too large), or what
    happens to the process: slow sleeps `seconds`, kill ends it by SIGKILL, hang sleeps for ever."""
    target: Literal["gradient", "activation", "loss", "batch"] = "gradient"
    """Where a value is injected; a batch has to hold floating-point numbers for it."""
    parameter: str | None = None
    """Parameter (gradient) or module (activation) that is struck; default: the first one. Under loop.compile
    the micro-batch that is struck there runs uncompiled."""
    micro_batch: int = 0
    """Micro-batch of the step in which it strikes, counted from 0."""
    scale: float = 1000.0
    """Factor of a spike."""
    seconds: float = 5.0
    """Length of a slow step."""

    def __post_init__(self) -> None:
        require_not_negative(self, "step", "rank", "micro_batch", "seconds")
