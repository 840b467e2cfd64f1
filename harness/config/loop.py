"""The section `loop`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from harness.config.checks import require, require_not_negative, require_positive

__all__ = ["LoopConfig"]

MAX_STEPS = 10**15


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long, how much at once, in which precision, and how often to look."""

    SECTION = "loop"

    steps: int = 400
    """Optimizer steps of the whole run. A finished run goes on when this is raised, at the learning rate that
    it ended with; see schedule.steps."""
    global_batch: int = 16
    """Samples per optimizer step, over all ranks and micro-batches."""
    micro_batch: int | None = None
    """Samples per forward pass and rank, at most; default: all of a rank's share at once, but no more than in
    the attempt before, which may have had more ranks."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of forward and backward; parameters stay fp32. auto: what accelerate was told, else bf16 on
    CUDA and fp32 on CPU."""
    compile: bool = False
    """Compile the model with torch.compile."""
    compile_unit: Literal["model", "block"] = "model"
    """What is compiled as one. block: each element of the model's lists of layers by itself; alike ones share
    their code, so that a deep model compiles in the time of one layer."""
    compile_backend: str = "inductor"
    """What torch.compile makes of it: inductor, or aot_eager where no compiler is found."""
    eval_every: int = 100
    """Steps between evaluations; 0: only at the end."""
    eval_samples: int = 256
    """Held-out samples per evaluation, always the same ones."""
    gc_every: int = 50
    """Steps between two collections of Python's cyclic garbage, the same ones on all ranks, which else wait
    for each other's pauses; 0: whenever Python likes."""

    def __post_init__(self) -> None:
        require_positive(self, "steps", "global_batch", "eval_samples")
        require(self, "steps", self.steps <= MAX_STEPS, "there are at most 10^15")
        require_not_negative(self, "eval_every", "gc_every")
        if self.micro_batch is not None:
            require_positive(self, "micro_batch")
