"""The section `watchdog`."""

from __future__ import annotations

from dataclasses import dataclass

from harness.config.checks import require, require_positive

__all__ = ["WatchdogConfig"]


@dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """When a rank that makes no progress ends the run, with the stacks of all ranks in `incidents/`."""

    SECTION = "watchdog"

    enabled: bool = True
    """Watch for ranks that hang; never under `debug`, nor while a debugger has stopped a rank."""
    min_step_s: float = 60.0
    """A forward pass, a backward pass or an update may take so many seconds at least; `min_other_s` with
    `loop.compile`, which compiles again now and then."""
    min_other_s: float = 240.0
    """The same for what waits for disks and networks, or runs code of yours: a batch, an evaluation, a
    checkpoint, a callback, a rollback. Others wait for it for `parallel.timeout_s` at most."""
    ratio: float = 10.0
    """Each may besides take so many times as long as the slowest of its kind lately."""
    first_s: float = 1800.0
    """Bound in seconds of the start, of the end, and of the first three of each kind but saves: caches are
    cold, and models are compiled. Others wait for a rank for `parallel.timeout_s` at most, then too."""

    def __post_init__(self) -> None:
        require_positive(self, "min_step_s", "min_other_s", "first_s")
        require(self, "ratio", self.ratio >= 1, "it has to be 1 or more")
