"""How long a rank computes in a step, without waiting for other ranks.

On CPUs by the host's clock: until its own gradients are complete, which under DDP is before the last
reduction, and without the time in FSDP2's collectives. On CUDA by events, so that nothing waits for the
device: of the newest step that it has done, some steps late. FSDP2 on CUDA waits for others on the device,
between kernels, which events of this kind do not tell: there the time is that of the whole pass.
"""

from __future__ import annotations

import time
from collections import deque

import torch

__all__ = ["StepTimer"]


class StepTimer:
    """Times one rank's forward and backward passes; synchronises nothing.

    Args:
        device: Where they run.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._start_s = 0.0
        self._done_s: float | None = None
        self._waited_s = 0.0
        self._start: torch.cuda.Event | None = None
        self._done: torch.cuda.Event | None = None
        self._running: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._newest_s: float | None = None

    def begin(self) -> None:
        """The first forward pass of a step begins."""
        self._start_s, self._done_s, self._waited_s = time.perf_counter(), None, 0.0
        self._start, self._done = self._mark(), None

    def waited(self, seconds: float) -> None:
        """The host stood in a collective."""
        if self._done_s is None:
            self._waited_s += seconds

    def local_done(self) -> None:
        """This rank's own gradients are complete: what comes is their reduction. From the backward pass."""
        self._done_s, self._done = time.perf_counter(), self._mark()

    def end(self) -> float:
        """Seconds of the step's own computing; on CUDA those of the newest step that is done."""
        if self._done_s is None:
            self.local_done()
        assert self._done_s is not None
        if self._start is not None and self._done is not None:
            self._running.append((self._start, self._done))
            while self._running and self._running[0][1].query():
                start, done = self._running.popleft()
                self._newest_s = start.elapsed_time(done) / 1000
        own_s = self._done_s - self._start_s - self._waited_s
        return own_s if self._newest_s is None else self._newest_s

    def _mark(self) -> torch.cuda.Event | None:
        """The moment at which the device comes by."""
        if not self._on_cuda:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
