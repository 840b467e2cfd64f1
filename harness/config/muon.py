"""The section `muon`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from harness.config.checks import require, require_not_negative, require_positive

__all__ = ["MuonConfig"]


@dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """With `optim.name: muon`, how the hidden matrices are stepped; everything else follows `optim`."""

    SECTION = "muon"

    lr: float | None = None
    """Peak learning rate of the matrices; null: optim.lr, which suits `adjust_lr: match_rms_adamw`. With
    `original` about 0.02. It follows the schedule as optim.lr does."""
    weight_decay: float | None = None
    """Decoupled decay of the matrices; null: optim.weight_decay."""
    momentum: float = 0.95
    """Decay rate of the momentum."""
    nesterov: bool = True
    """Whether the momentum is Nesterov's."""
    ns_steps: int = 5
    """Newton-Schulz iterations that orthogonalise an update."""
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """How an update is scaled by a matrix's shape: as large as AdamW's (arXiv 2502.16982), or as in Muon's
    first implementation."""
    exclude: tuple[str, ...] = ()
    """Matrices whose names contain one of these are left to AdamW, such as `router`."""

    def __post_init__(self) -> None:
        if self.lr is not None:
            require_positive(self, "lr")
        if self.weight_decay is not None:
            require_not_negative(self, "weight_decay")
        require(self, "momentum", 0 <= self.momentum < 1, "it lies in [0, 1)")
        require(self, "ns_steps", 0 < self.ns_steps < 100, "it lies between 1 and 99")
