"""Which ranks are late, by what each of them said last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.config import WatchdogConfig
from harness.training.progress import Phase, Progress

__all__ = ["RankState", "late_ranks", "limit_s"]

_NUM_FIRST = 3
"""How often a phase has to have ended before its usual time is known."""
_IN_STEP = (Phase.FORWARD, Phase.BACKWARD, Phase.UPDATE)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankState:
    """What a rank said last, and how long ago."""

    rank: int
    order: int
    """Phases entered before: where it is in the order that all ranks follow."""
    doing: str
    age_s: float
    """How long it has been doing that."""
    limit_s: float
    host: str
    pid: int
    beat: int
    waits: bool = False
    """It waits for others, or for its device, and that one perhaps for others."""
    timed_out: bool = False
    """It has waited for others for as long as it may: a collective has ended with an error."""
    silent_s: float = 0.0
    """How long it has said nothing; 0 where that is nothing unusual."""

    @property
    def is_late(self) -> bool:
        """It has been longer where it is than it may."""
        return self.age_s + self.silent_s > self.limit_s

    def __str__(self) -> str:
        who = f"rank {self.rank} ({self.host}, pid {self.pid})"
        if self.silent_s:
            return f"{who} has given no sign of life for {self.silent_s:.0f} s, and was last {self.doing}"
        return f"{who} has been {self.doing} for {self.age_s:.0f} s"


def limit_s(config: WatchdogConfig, progress: Progress, *, compiles: bool) -> float:
    """How long what `progress` is at may take, in seconds."""
    phase = progress.at.phase
    is_first = progress.num_done[phase] < _NUM_FIRST and phase != Phase.SAVE  # which warms nothing up
    if phase in (Phase.START, Phase.END) or is_first:
        return config.first_s
    least_s = config.min_step_s if phase in _IN_STEP and not compiles else config.min_other_s
    return max(least_s, config.ratio * progress.slowest_s.get(phase, 0.0))


def late_ranks(states: Sequence[RankState], *, patience_s: float) -> list[RankState]:
    """The ranks for which the others wait in vain, candidates where several are equally far; empty if none.

    They are when all of those furthest behind are over their limit and not merely silent, when a rank that is
    further has waited for them for `patience_s`, or when a collective has timed out already.
    """
    behind = min(state.order for state in states)
    hindmost = [state for state in states if state.order == behind]
    late = any(state.is_late and not state.silent_s for state in states) and all(s.is_late for s in hindmost)
    if late or _keep_waiting(states, hindmost, patience_s) or any(state.timed_out for state in states):
        return [state for state in states if state.silent_s] or hindmost
    return []


def _keep_waiting(states: Sequence[RankState], hindmost: Sequence[RankState], patience_s: float) -> bool:
    """Whether a rank has waited for those behind for so long, in which they have done nothing else either."""
    further = [state for state in states if state.order > hindmost[0].order and state.waits]
    stood = all(state.age_s + state.silent_s > patience_s for state in hindmost)
    return stood and any(state.age_s > patience_s for state in further)
