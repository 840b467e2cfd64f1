"""The section `incidents`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from harness.config.checks import require, require_not_negative, require_positive

__all__ = ["IncidentsConfig"]


@dataclass(frozen=True, kw_only=True)
class IncidentsConfig:
    """What every rank remembers of its last steps, and what of it is kept of an incident, in
    `incidents/step-N/` of the run's directory."""

    SECTION = "incidents"

    enabled: bool = True
    """Remember, and write down what is known of steps that went wrong, of hangs, crashes and failed
    allocations."""
    remember_steps: int = 16
    """Steps that each rank remembers, in host memory: samples, states of the random number generators, losses
    and timings; those whose verdict is on its way besides."""
    keep: int = 20
    """Incidents of which a folder is kept; the oldest goes first, fp16 overflows before others."""
    max_bytes: int = 1 << 30
    """Bytes of all these folders together; a batch or a trace that alone is too large is left out."""
    save_batch: bool = False
    """Keep the micro-batches that a culprit was handed, as a safetensors file. They are held in host memory
    until their step's verdict is known."""
    profile_steps: tuple[int, ...] = ()
    """Steps of which each rank writes a torch profiler trace; that slows these steps down."""
    rerun: Literal["off", "on"] = "off"
    """Run the culprit's micro-batch of an incident again on the spot, on all ranks at the same step: with the
    same kernels, deterministic ones, fp32, other attention; docs/incidents.md. Micro-batches are held in host
    memory until their step's verdict is known. At most 4 incidents in 100 steps, and of each as many
    variations as take about half a minute."""
    recompute_every: int = 0
    """Steps between steps that are computed twice on each rank, which has to give the same bits; 0: never.
    Finds arithmetic that is wrong now and then, and the rank; costs a step's forward and backward pass each
    time. Not under FSDP2, nor where kernels are not deterministic."""
    profile_after: bool = False
    """Write a torch profiler trace of the step that follows each incident."""

    def __post_init__(self) -> None:
        require_positive(self, "remember_steps", "keep", "max_bytes")
        require_not_negative(self, "recompute_every")
        require(self, "profile_steps", all(step >= 0 for step in self.profile_steps), "steps count from 0")
