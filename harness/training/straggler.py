"""Names ranks that hold up all others: slow ones, and ones whose data comes late.

Every rank is as slow as the slowest, so wall times do not tell which one that is. What tells is how long each
computes without waiting for others (`StepTimer`), and how long it waits for its batch. Both come with every
record, the same on all ranks, so all find the same ranks at the same step.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import psutil
import torch

from harness.config import StragglerConfig
from harness.dist import World, gather
from harness.records import RankRow, StepRecord
from harness.runlog import events
from harness.stability.rank_table import rank_column
from harness.tracking.resources import describe_gpu
from harness.training.callbacks import Callback, Rollback, Training
from harness.training.journal import Journal

__all__ = ["Late", "Stragglers", "Window", "described"]

MIN_STEPS = 3
MOST_STEPS = 0.75
"""In so many of a window's steps a rank has to be late: one odd step does not make a slow rank."""
MOST_NAMED = 8

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Why = Literal["straggler", "data-bound rank"]


@dataclass(frozen=True, slots=True)
class Late:
    """A rank for which the others wait, and why; seconds are those of a step."""

    rank: int
    why: Why
    own_s: float
    best_s: float
    """The same of the rank for which nobody waits."""

    def __str__(self) -> str:
        if self.why == "straggler":
            return (
                f"computes {self.own_s:.3g} s in a step, and the first rank {self.best_s:.3g} s: "
                f"{100 * self.best_s / self.own_s:.0f} % of its speed"
            )
        return (
            f"waits {self.own_s:.3g} s in a step for its batch, and the first rank {self.best_s:.3g} s; "
            "its computing is not what the others wait for"
        )


class Window:
    """What the ranks did in the steps of the last while.

    A rank is late by what it needs for batch and computing together: one that computes slowly while another
    one is later for its data's sake holds up nobody.

    Args:
        below_frac: See `StragglerConfig`.
    """

    def __init__(self, below_frac: float) -> None:
        self._below_frac = below_frac
        self.clear()

    def clear(self) -> None:
        """Begins anew."""
        self.num_steps, self.seconds = 0, 0.0
        self._compute_s = self._data_s = self._num_late = self._num_starved = np.zeros(1)

    def add(self, ranks: Sequence[RankRow]) -> None:
        """A step."""
        compute_s = rank_column(ranks, "compute_s")
        data_s = rank_column(ranks, "data_wait_s")
        self.num_steps += 1
        self.seconds += float((compute_s + data_s).max())
        self._compute_s, self._data_s = self._compute_s + compute_s, self._data_s + data_s
        self._num_late = self._num_late + self._is_late(compute_s + data_s)
        first = (compute_s + data_s).argmin()
        is_starved = data_s - data_s[first] > compute_s - compute_s[first]
        self._num_starved = self._num_starved + is_starved

    def late(self) -> list[Late]:
        """The ranks that were late in the sum of the steps and in most of them, the latest first."""
        total_s = self._compute_s + self._data_s
        is_late = self._is_late(total_s) & (self._num_late >= MOST_STEPS * self.num_steps)
        ranks = np.flatnonzero(is_late)[np.argsort(-total_s[is_late], kind="stable")]
        return [self._describe(int(rank), int(total_s.argmin())) for rank in ranks]

    def _is_late(self, total_s: Floats) -> Bools:
        is_late: Bools = self._below_frac * total_s > total_s.min()
        return is_late

    def _describe(self, rank: int, first: int) -> Late:
        """Why a rank is late: for its computing or, in most steps, more for its data."""
        compute_s, data_s = self._compute_s / self.num_steps, self._data_s / self.num_steps
        if self._num_starved[rank] > self.num_steps / 2:
            return Late(rank, "data-bound rank", float(data_s[rank]), float(data_s[first]))
        return Late(rank, "straggler", float(compute_s[rank]), float(compute_s[first]))


class Stragglers(Callback):
    """Tells of ranks that have been late for a while, once for each time that they become so.

    Args:
        journal: This rank's.
    """

    def __init__(self, config: StragglerConfig, world: World, journal: Journal) -> None:
        self._config, self._world, self._journal = config, world, journal
        self._window = Window(config.below_frac)
        self._known: Mapping[int, Why] = {}

    def on_step(self, run: Training, record: StepRecord) -> None:
        if not self._config.enabled or len(record.per_rank) < 2:
            return
        self._window.add(record.per_rank)
        if self._window.seconds < self._config.window_s or self._window.num_steps < MIN_STEPS:
            return
        late = self._window.late()
        self._window.clear()
        new = [one for one in late if self._known.get(one.rank) != one.why][:MOST_NAMED]
        self._known = {one.rank: one.why for one in late}
        if new:
            self._tell(new, record.step)

    def on_rollback(self, run: Training, rollback: Rollback) -> None:
        self._window.clear()

    def _tell(self, late: Sequence[Late], step: int) -> None:
        """On all ranks: the late ones say where they are, and how their devices are."""
        ranks = {one.rank for one in late}
        places = gather(lambda: described(self._world.device) if self._world.rank in ranks else "")
        for one in late:
            summary = f"rank {one.rank} {one}; {places[one.rank]}"
            self._journal.say(f"{one.why}: {summary}")
            what = events.Incident(
                kind=one.why, summary=summary, reason=summary, rank=one.rank, done="nothing: the run goes on"
            )
            self._journal.event(what, step)


def described(device: torch.device) -> str:
    """Host, device, and whatever may hold it back; raises nothing, as other ranks wait for the answer."""
    where = f"host {platform.node()}, pid {os.getpid()}, {device}"
    try:
        return f"{where}, {_pace(device)}"
    except Exception as error:  # noqa: BLE001  (what drivers and containers refuse is no reason to end a run)
        return f"{where}, its clocks and load are not known: {error or type(error).__name__}"


def _pace(device: torch.device) -> str:
    if device.type == "cuda":
        return describe_gpu(str(torch.cuda.get_device_properties(device).uuid))
    frequency = psutil.cpu_freq()
    clock = f"{frequency.current:.0f} MHz, " if frequency is not None else ""
    return f"{clock}load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
