"""The items of `tracking.alerts`, and which there are by default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from harness.config.checks import require_not_negative, require_positive
from harness.runlog.names import EventName, Metric, Prefix

__all__ = ["DEFAULT_ALERTS", "AlertConfig"]


@dataclass(frozen=True, kw_only=True)
class AlertConfig:
    """One rule: what has to happen for people to be told."""

    SECTION = "tracking.alerts"

    kind: Literal["nonfinite", "above", "below", "spike", "drop", "plateau", "stall", "event"]
    """nonfinite: a NaN or an infinity; above, below: crosses `value`; spike, drop: more than `value` times,
    or less than `value` times, the median of the last `window` points; plateau: the smallest value has not
    fallen by the fraction `value` in `window` points; stall: nothing logged for `value` seconds; event: it
    happened."""
    metric: str = Metric.TRAIN_LOSS
    """Metric, or name of the event; `*` matches anything (`val/*`)."""
    value: float = 0.0
    """What the kind compares with."""
    window: int = 100
    """Points looked back at; spike and drop wait for a quarter of them."""
    cooldown_s: float = 600.0
    """Seconds for which the rule stays silent after it spoke; what it keeps to itself then is counted, and
    said afterwards."""

    def __post_init__(self) -> None:
        require_positive(self, "window")
        require_not_negative(self, "cooldown_s")
        if self.kind in ("spike", "drop", "plateau", "stall"):
            require_positive(self, "value")


DEFAULT_ALERTS = (
    AlertConfig(kind="nonfinite", metric="*"),
    AlertConfig(kind="event", metric=EventName.INCIDENT),
    AlertConfig(kind="stall", value=600.0),
    AlertConfig(kind="below", metric=f"{Prefix.SYSTEM}*disk_free_gb", value=1.0),
)
