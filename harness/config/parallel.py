"""The section `parallel`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from harness.config.checks import require, require_not_negative, require_positive

__all__ = ["ParallelConfig"]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is spread over the processes."""

    SECTION = "parallel"

    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """auto: plain in one process, ddp in several. fsdp (FSDP2) shards all of its state."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if there is one."""
    threads: int = 0
    """Threads that each process computes with on the CPU. 0: its share of the cores that it may use (affinity
    and quota, over the processes on the machine), unless you, and not a launcher, set OMP_NUM_THREADS.
    Another number may change the last bits of results."""
    bucket_cap_mb: int = 25
    """Size of DDP's gradient buckets in MiB."""
    find_unused: bool = False
    """DDP looks in every step for parameters that the loss does not depend on, which costs a walk through the
    graph; without it such a parameter ends the run with an error that names it. FSDP needs no such search."""
    timeout_s: float = 300.0
    """How long one rank may wait for another before the run is ended. Not in a save that goes on in the
    background: that is bounded by checkpoint.give_up_after_s."""
    silent_s: float = 15.0
    """How long another machine may be out of reach before the connections to it are ended, and the run with
    them. Shorter breaks are waited out."""

    def __post_init__(self) -> None:
        require_positive(self, "bucket_cap_mb", "timeout_s")
        require(self, "silent_s", self.silent_s >= 1, "it has to be 1 second or more")
        require_not_negative(self, "threads")
