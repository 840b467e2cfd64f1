"""The section `optim`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from harness.config.checks import require, require_not_negative, require_positive

__all__ = ["OptimConfig"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer. Norms, biases and other one-dimensional parameters are never decayed."""

    SECTION = "optim"

    name: Literal["adamw", "adam", "sgd", "adagrad", "muon"] = "adamw"
    """The first four run fused and take the guard's verdict on the device. muon: Muon for the hidden matrices
    (section `muon`), AdamW for embeddings, head, norms and biases."""
    lr: float = 3e-3
    """Peak learning rate; with muon, of what AdamW steps."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's decay rates."""
    eps: float = 1e-8
    """Adam's and Adagrad's denominator offset."""
    weight_decay: float = 0.1
    """Decay of matrices; decoupled for adamw."""
    fused: Literal["auto", "torch", "triton"] = "auto"
    """Whose kernel steps adamw: torch's, or on CUDA one in Triton, which writes no gradients back. auto is
    torch's, until the other is measured to be faster. A run may change it: checkpoints are the same."""
    momentum: float = 0.9
    """SGD's momentum."""

    def __post_init__(self) -> None:
        require_positive(self, "lr", "eps")
        require_not_negative(self, "weight_decay", "momentum")
        require(
            self,
            "fused",
            self.fused != "triton" or self.name in ("adamw", "muon"),
            f"the kernel in Triton is AdamW's, and optim.name is {self.name}",
        )
        require(self, "betas", all(0 <= b < 1 for b in self.betas), "both have to lie in [0, 1)")
