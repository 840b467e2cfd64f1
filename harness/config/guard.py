"""The section `guard`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from harness.config.checks import require, require_not_negative, require_positive

__all__ = ["GuardConfig", "SpikeRuleName"]


SpikeRuleName = Literal["robust", "zclip", "persistent", "sigma"]
"""The rules of `harness.stability.detectors`."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What the stability guard measures and what it does about it."""

    max_norm: float | None = 1.0
    """Gradients are scaled down to this L2 norm; null or 0: never."""
    nonfinite: Literal["skip", "stop"] = "skip"
    """On a NaN or Inf in any rank's loss or gradient: leave the step out, or end the run."""
    spike: Literal["off", "warn", "clip", "skip"] = "warn"
    """On a finite but extraordinary loss or gradient norm: say so, clip to the usual norm, leave it out."""
    spike_rule: SpikeRuleName = "robust"
    """What counts as extraordinary; docs/stability.md has the rules. The three settings that follow are the
    robust rule's; the others keep the values of their papers."""
    spike_threshold: float = 7.0
    """Robust z-score from which a step counts as a spike."""
    spike_window: int = 128
    """Unflagged steps that the spike rule looks back on."""
    spike_warmup: int = 64
    """Steps before the spike rule speaks."""
    absurd_norm_ratio: float | None = 1e4
    """A finite gradient of more than this many times the usual norm is left out, whatever `spike` says; null
    or 0: never."""
    max_consecutive_skips: int = 3
    """More skipped steps in a row than this roll the run back where that is possible, else end it."""
    max_skip_frac: float = 0.25
    """Largest share of skipped steps among the last 100 that is borne."""
    max_rollbacks: int = 3
    """Rollbacks that a run may take before it is ended."""
    rollback_skip_steps: int = 200
    """Steps' worth of data that a rollback steps over, from its checkpoint on; at least up to the step that
    caused it. PaLM (arXiv 2204.02311) took 200 to 500."""
    rollback_cooldown_steps: int = 50
    """Applied steps that have to follow a rollback before the next one; trouble sooner ends the run."""
    replicas: Literal["off", "warn", "stop"] = "warn"
    """On replicas that are not the same: in the reduced gradient's norm, compared every step, or in a
    checksum of parameters and optimizer state."""
    replicas_every: int = 101
    """Steps between checksums; 0: never. Odd, because an even cadence misses an error of period two."""
    lag_steps: int = 2
    """Steps after which a verdict is read back; the device itself acts at once. 0 synchronises every step."""
    extremes_every: int = 1
    """Steps between measurements of max-abs and zeros; norm, NaN and Inf are measured every step. On CUDA the
    two come free with the others."""
    per_parameter_every: int = 10
    """Steps between records with a row per parameter; 0: never. An incident always has them."""
    sample_every: int = 100
    """Steps between samples of weights and updates (norms, update / weight, Adam's second moments, gradient
    underflow); 0: never."""
    init_loss_scale: float = 65536.0
    """Loss scale at the start of an fp16 run."""
    loss_scale_growth_steps: int = 2000
    """Clean fp16 steps after which the loss scale is doubled."""

    def __post_init__(self) -> None:
        self._check_spikes()
        require_positive("guard", self, ["init_loss_scale"])
        require_positive(
            "guard", self, ["max_consecutive_skips", "loss_scale_growth_steps", "extremes_every"]
        )
        require_not_negative("guard", self, ["lag_steps", "per_parameter_every"])
        require_not_negative("guard", self, ["max_rollbacks", "rollback_skip_steps"])
        require_not_negative("guard", self, ["rollback_cooldown_steps", "sample_every"])
        require(0 < self.max_skip_frac <= 1, "guard.max_skip_frac", self.max_skip_frac, "it lies in (0, 1]")
        require(
            self.replicas_every == 0 or (self.replicas_every > 0 and self.replicas_every % 2 == 1),
            "guard.replicas_every",
            self.replicas_every,
            "it has to be odd, or 0 for never: an even cadence misses an error of period two",
        )
        if self.max_norm is not None:
            require_not_negative("guard", self, ["max_norm"])

    def _check_spikes(self) -> None:
        require(
            self.spike_rule in get_args(SpikeRuleName),
            "guard.spike_rule",
            self.spike_rule,
            f"the rules are {', '.join(get_args(SpikeRuleName))}",
        )
        require_positive("guard", self, ["spike_threshold", "spike_window"])
        require(
            0 <= self.spike_warmup <= self.spike_window,
            "guard.spike_warmup",
            self.spike_warmup,
            f"it has to lie between 0 and guard.spike_window = {self.spike_window}",
        )
        require(
            not self.absurd_norm_ratio or 1 < self.absurd_norm_ratio < float("inf"),
            "guard.absurd_norm_ratio",
            self.absurd_norm_ratio,
            "it has to be greater than 1",
            "set it to null or 0 to apply every finite gradient",
        )
