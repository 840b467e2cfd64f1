"""The section `tracking`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from harness.config.alerts import DEFAULT_ALERTS, AlertConfig
from harness.config.checks import require, require_not_negative, require_positive

__all__ = ["TrackingConfig"]


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """What is written down and where it is mirrored."""

    SECTION = "tracking"

    log_every: int = 10
    """Steps between printed lines; beyond 512 ranks also between records of what each said. The log has every
    step."""
    tensorboard: bool = True
    """Mirror the log to TensorBoard."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Mirror the log to Weights & Biases; online falls back to offline, and says so, without an account."""
    trackio: bool = False
    """Mirror the log to trackio, in the folder that it uses itself (TRACKIO_DIR)."""
    prometheus: bool = False
    """Serve the newest numbers over HTTP for Prometheus, from the side process of rank 0: `/metrics`."""
    prometheus_host: str = "127.0.0.1"
    """Address on which that is served; 0.0.0.0: to everybody who can reach this machine."""
    prometheus_port: int = 9464
    """Its port; 0: any that is free, as `side.log` says."""
    mirrors: tuple[str, ...] = ()
    """Mirrors of your own, each `package.module:Class`."""
    project: str = "harness"
    """Project at W&B and in trackio."""
    group: str | None = None
    """Name that related runs share."""
    tags: tuple[str, ...] = ()
    """Labels to find the run by."""
    notes: str = ""
    """Free text about the run."""
    progress: Literal["auto", "bar", "lines", "off"] = "auto"
    """auto: a bar on a terminal, lines otherwise."""
    histograms_every: int = 100
    """Steps between histograms of rank 0's gradients and parameters, counted on the device; 0: never."""
    system_every_s: float = 10.0
    """Seconds between samples of processor, memory, disk and GPUs on each node; 0: none."""
    alerts: tuple[AlertConfig, ...] = DEFAULT_ALERTS
    """When people are told: on the terminal, in the log, at W&B and at the webhook."""
    webhook: str | None = None
    """Address that each alert is sent to as JSON by HTTP POST."""

    def __post_init__(self) -> None:
        require_positive(self, "log_every")
        require_not_negative(self, "system_every_s", "histograms_every")
        in_range = 0 <= self.prometheus_port < 65536
        require(self, "prometheus_port", in_range, "it has to lie between 0 and 65535")
        for name in self.mirrors:
            require(
                self,
                "mirrors",
                re.fullmatch(r"\w+(\.\w+)*:\w+", name) is not None,
                "each has to be package.module:Class",
                value=name,
            )
        require(
            self,
            "webhook",
            self.webhook is None or self.webhook.startswith(("http://", "https://")),
            "it has to begin with http:// or https://",
        )
