"""A torch profiler trace of single steps: those that the configuration names, and one after an incident."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from harness.config import IncidentsConfig

__all__ = ["ProfiledStep", "StepProfiler"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ProfiledStep:
    """A step and the profiler that has recorded it."""

    step: int
    """That in whose incident's folder it belongs."""
    profiler: profile


class StepProfiler:
    """Profiles a step from `begin` to `end`; waits for the device at the end of such a step only."""

    def __init__(self, config: IncidentsConfig, device: torch.device) -> None:
        self._steps = frozenset(config.profile_steps)
        self._activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            self._activities.append(ProfilerActivity.CUDA)
        self._after: int | None = None
        self._running: ProfiledStep | None = None

    def follow(self, step: int) -> None:
        """The next step is profiled, for the incident of `step`."""
        self._after = step

    def begin(self, step: int) -> None:
        """A step begins."""
        self._running = None
        if step not in self._steps and self._after is None:
            return
        profiler = profile(activities=self._activities, record_shapes=True)
        try:
            profiler.start()
        except RuntimeError as error:  # somebody else's profiler runs
            logger.warning("step %d is not profiled: %s", step, error)
            return
        self._running = ProfiledStep(step if step in self._steps else self._after or 0, profiler)
        self._after = None

    def end(self) -> ProfiledStep | None:
        """The step has ended; its trace, if it was profiled."""
        profiled, self._running = self._running, None
        if profiled is not None:
            profiled.profiler.stop()
        return profiled
