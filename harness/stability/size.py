"""Whether the size of a step's loss and gradient is in order, and what is done if it is not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.config import GuardConfig
from harness.stability.credible import CredibleNorm
from harness.stability.detectors import SpikeDetection, SpikeRule, configured_rule

__all__ = ["SizeCheck", "SizeFinding"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeFinding:
    """What the size of a step calls for: 0-d tensors on the device, float64 where nothing else is said."""

    limit: Tensor
    """The gradient norm to clip to; inf: none."""
    skip: Tensor
    """Bool: the step is to be left out."""
    is_spike: Tensor
    """Bool: an incident."""
    is_outlier: Tensor
    """Bool: out of the ordinary, and no incident."""
    is_absurd: Tensor
    """Bool: the norm cannot be meant; an incident."""
    clipped_by_spike: Tensor
    """Bool: `limit` is the spike rule's and not the maximum of every step."""
    norm_score: Tensor
    loss_score: Tensor
    usual_norm: Tensor
    """NaN, like `usual_loss`: nothing was to be expected."""
    usual_loss: Tensor
    num_in_a_row: Tensor


class SizeCheck:
    """The spike rule and, whatever the rule, the bound of what is credible.

    | `guard.spike` | outlier batch               | incident              | absurd norm |
    |---------------|-----------------------------|-----------------------|-------------|
    | off           | not looked for              | not looked for        | left out    |
    | warn          | noted                       | said                  | left out    |
    | clip          | noted, clipped to the usual | said, the same        | left out    |
    | skip          | is an incident              | left out if it is flagged itself | left out |

    Raises:
        ConfigError: there is no such spike rule.
    """

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._credible = CredibleNorm(config.absurd_norm_ratio, max_norm=config.max_norm)
        self._rule: SpikeRule | None = None if config.spike == "off" else configured_rule(config)

    def live_state(self) -> dict[str, Tensor]:
        """The spike rule's state, no copy; empty without a rule."""
        return {} if self._rule is None else self._rule.live_state

    def state_dict(self) -> dict[str, Any]:
        """Copies of all state, on the device."""
        rule = {} if self._rule is None else self._rule.state_dict()
        return {"spike_rule": rule, "credible_norm": self._credible.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave.

        Raises:
            CheckpointError: it was saved by another spike rule or with another window.
        """
        if self._rule is not None:
            self._rule.load_state_dict(state["spike_rule"])
        self._credible.load_state_dict(state.get("credible_norm", {}))  # earlier versions did not save it

    def check(self, norm: Tensor, loss: Tensor, trusted: Tensor) -> SizeFinding:
        """What the size of a step calls for. Does not synchronise.

        Args:
            norm: 0-d float64, of the true gradient, before clipping.
            loss: 0-d float64, the global batch's mean.
            trusted: 0-d bool, neither holds a NaN or an Inf.
        """
        is_absurd, credible_norm = self._credible.check(norm, trusted)
        maximum = torch.full_like(norm, self._config.max_norm or torch.inf)
        if self._rule is None:
            return _without_rule(maximum, is_absurd, credible_norm)
        detection = self._rule.detect(norm.log(), loss, trusted & ~is_absurd)
        limit, skip, is_incident = self._act(detection, maximum, is_absurd)
        return SizeFinding(
            limit=limit,
            skip=skip,
            is_spike=is_incident | is_absurd,
            is_outlier=detection.flagged & ~is_incident,
            is_absurd=is_absurd,
            clipped_by_spike=limit < maximum,
            norm_score=detection.scores[0],
            loss_score=detection.scores[1],
            usual_norm=torch.where(is_absurd, credible_norm, detection.usual[0]),
            usual_loss=detection.usual[1],
            num_in_a_row=detection.num_in_a_row,
        )

    def _act(
        self, detection: SpikeDetection, maximum: Tensor, is_absurd: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Norm to clip to, whether to skip, whether the step is an incident."""
        if self._config.spike == "clip":
            return torch.minimum(maximum, detection.norm_limit), is_absurd, detection.is_incident
        if self._config.spike == "skip":
            # A batch that is left out is never a thing to pass over in silence.
            return maximum, is_absurd | detection.flagged, detection.is_incident | detection.flagged
        return maximum, is_absurd, detection.is_incident


def _without_rule(maximum: Tensor, is_absurd: Tensor, credible_norm: Tensor) -> SizeFinding:
    zero, no = torch.zeros_like(maximum), torch.zeros_like(is_absurd)
    return SizeFinding(
        limit=maximum,
        skip=is_absurd,
        is_spike=is_absurd,
        is_outlier=no,
        is_absurd=is_absurd,
        clipped_by_spike=no,
        norm_score=zero,
        loss_score=zero,
        usual_norm=credible_norm,
        usual_loss=zero,
        num_in_a_row=zero,
    )
