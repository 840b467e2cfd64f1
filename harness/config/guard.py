"""The section `guard`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from harness.config.checks import require, require_not_negative, require_positive

__all__ = ["SPIKE_RULES", "GuardConfig"]

SPIKE_RULES = ("robust", "zclip", "persistent", "sigma")
"""The bundled rules: each is the file of its name in `harness/stability/rules`."""

_ROBUST_SETTINGS = ("threshold", "window", "warmup")
"""The robust rule's, which are keys of their own: guard.spike_threshold and so on."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What the stability guard measures and what it does about it."""

    SECTION = "guard"

    max_norm: float | None = 1.0
    """Gradients are scaled down to this L2 norm; null or 0: never."""
    nonfinite: Literal["skip", "stop"] = "skip"
    """On a NaN or Inf in any rank's loss or gradient: leave the step out, or end the run."""
    spike: Literal["off", "warn", "clip", "skip"] = "warn"
    """On a finite but extraordinary loss or gradient norm: say so, clip to the usual norm, leave it out."""
    spike_rule: str = "robust"
    """What counts as extraordinary: robust, zclip, persistent, sigma (docs/stability.md), or
    `package.module:Class` for a rule of your own (docs/extending.md)."""
    spike_threshold: float = 7.0
    """Of the robust rule: score from which a step counts as a spike."""
    spike_window: int = 128
    """Of the robust rule: unflagged steps that it looks back on."""
    spike_warmup: int = 64
    """Of the robust rule: steps before it speaks."""
    spike_args: tuple[str, ...] = ()
    """Settings of another rule as `name=value`, such as `[threshold=3, decay=0.99]`; its class lists them."""
    absurd_norm_ratio: float | None = 1e4
    """A finite gradient of more than this many times the usual norm is left out, whatever `spike` says; null
    or 0: never."""
    undo: Literal["auto", "always", "never"] = "auto"
    """Whose update is taken back, and the step counted as skipped, if it leaves weights or moments that are
    not finite though the gradient was: Muon's (auto), of all optimizers, of none. It takes a copy of their
    weights and state while they step, and one read of both (docs/stability.md)."""
    max_consecutive_skips: int = 3
    """More skipped steps in a row than this roll the run back where that is possible, else end it."""
    max_skip_frac: float = 0.25
    """Largest share of skipped steps among the last 100 that is tolerated."""
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
    during_backward: Literal["off", "on"] = "off"
    """Whether the gradients of a model of one process are measured while the backward pass computes, each as
    soon as it is complete, on CUDA on a stream of its own; off: once it is over. Under DDP and FSDP2 they
    always are. What changes a gradient after that is seen if torch counts it as a change: not through `.data`
    nor numpy."""
    per_parameter_every: int = 10
    """Steps between records with a row per parameter; 0: never. An incident always has them."""
    sample_every: int = 100
    """Steps between samples of weights and updates (norms, update / weight, Adam's second moments, gradient
    underflow); 0: never."""
    checks: tuple[str, ...] = ()
    """`package.module:function` each, called with this section: they return a `harness.stability.Check`,
    which is measured every so many steps; docs/extending.md."""
    silent_errors: Literal["on", "off"] = "on"
    """Checks for errors that make no noise (docs/checks.md): gradients that nobody clears, layers that do not
    move, ranks with the same data, modules in the wrong mode, flipped bits. They warn, and change nothing."""
    state_every: int = 101
    """Of these, steps between looks at whether a step starts from the very bits that the one before has left;
    0: never. Odd, or 1: every step."""
    init_loss_scale: float = 65536.0
    """Loss scale at the start of an fp16 run."""
    loss_scale_growth_steps: int = 2000
    """Clean fp16 steps after which the loss scale is doubled."""

    def __post_init__(self) -> None:
        self._check_spikes()
        require_positive(self, "init_loss_scale", "loss_scale_growth_steps")
        require_positive(self, "max_consecutive_skips", "extremes_every")
        require_not_negative(self, "lag_steps", "per_parameter_every", "sample_every")
        require_not_negative(self, "max_rollbacks", "rollback_skip_steps", "rollback_cooldown_steps")
        require(self, "max_skip_frac", 0 < self.max_skip_frac <= 1, "it lies in (0, 1]")
        require(
            self,
            "replicas_every",
            self.replicas_every == 0 or (self.replicas_every > 0 and self.replicas_every % 2 == 1),
            "it has to be odd, or 0 for never: an even cadence misses an error of period two",
        )
        require(
            self,
            "state_every",
            self.state_every == 0 or (self.state_every > 0 and self.state_every % 2 == 1),
            "it has to be odd, or 0 for never",
        )
        if self.max_norm is not None:
            require_not_negative(self, "max_norm")

    def _check_spikes(self) -> None:
        require(
            self,
            "spike_rule",
            self.spike_rule in SPIKE_RULES or ":" in self.spike_rule,
            f"the rules are {', '.join(SPIKE_RULES)}, and package.module:Class for one of your own",
        )
        for given in self.spike_args:
            require(
                self,
                "spike_args",
                given.partition("=")[0].strip().isidentifier() and "=" in given,
                "each of them is name=value",
                value=given,
            )
        self._check_whose_settings()
        require_positive(self, "spike_threshold", "spike_window")
        require(
            self,
            "spike_warmup",
            0 <= self.spike_warmup <= self.spike_window,
            f"it has to lie between 0 and guard.spike_window = {self.spike_window}",
        )
        require(
            self,
            "absurd_norm_ratio",
            not self.absurd_norm_ratio or 1 < self.absurd_norm_ratio < float("inf"),
            "it has to be greater than 1",
            "set it to null or 0 to apply every finite gradient",
        )

    def _check_whose_settings(self) -> None:
        """A setting that the rule would not see is refused."""
        if self.spike_rule == "robust":
            names = ", ".join(f"guard.spike_{name}" for name in _ROBUST_SETTINGS)
            require(self, "spike_args", not self.spike_args, f"the robust rule's are {names}")
            return
        for name in _ROBUST_SETTINGS:
            value = getattr(self, f"spike_{name}")
            require(
                self,
                f"spike_{name}",
                value == getattr(type(self), f"spike_{name}"),
                f"it is a setting of the robust rule, and the rule is {self.spike_rule}",
                f"try --guard.spike_args '[{name}={value}]'",
            )
