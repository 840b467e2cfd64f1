"""What every spike rule is: a detector of one step at a time whose state lives on the device."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.errors import CheckpointError

__all__ = ["SpikeDetection", "SpikeRule", "no_limit", "shifted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpikeDetection:
    """What a rule found in one step, as tensors on the device.

    A flagged step is out of the ordinary: an incident if there is a sign that the run suffers, else an
    outlier batch, which is odd data as a rule. A step that is not trusted is neither.
    """

    flagged: Tensor
    """0-d bool: gradient norm or loss is out of the ordinary."""
    is_incident: Tensor
    """0-d bool. Also of a step that is not flagged itself, where the loss stays high after one that is."""
    scores: Tensor
    """`[2]` float64, of gradient norm and loss: how unusual, in the rule's own unit; 0 while the rule warms
    up and for what it does not look at."""
    usual: Tensor
    """`[2]` float64, gradient norm and loss that were to be expected; NaN where nothing was."""
    norm_limit: Tensor
    """0-d float64: the gradient norm that the rule would clip this step to; inf if none."""
    num_in_a_row: Tensor
    """0-d float64: steps, this one included, that a disturbance has lasted; 0: there is none, or the rule
    does not follow them."""

    @property
    def score(self) -> Tensor:
        """0-d float64: the greater of the two."""
        return self.scores.amax()


class SpikeRule(abc.ABC):
    """Looks at the steps of a run one after the other, from values that are equal on all ranks.

    All state is a few named tensors on the device of the values that it takes, so no call synchronises, and
    a rule that is loaded from a checkpoint goes on bit for bit.
    """

    SECTION = "guard.spike_args"
    """Where its arguments are set, for `harness.config.checks`."""

    def __init__(self) -> None:
        self._state: dict[str, Tensor] = {}

    @abc.abstractmethod
    def detect(self, log_norm_t: Tensor, loss_t: Tensor, trusted_t: Tensor) -> SpikeDetection:
        """Looks at the next step and learns from it if it is fit to learn from. Does not synchronise.

        Args:
            log_norm_t: 0-d, natural logarithm of the reduced gradient's norm before clipping.
            loss_t: 0-d, mean loss of the global batch; NaN throughout if the loop has none to give.
            trusted_t: 0-d bool, the step has no NaN, no Inf and no absurd norm: others are neither
                flagged nor learned.
        """

    @abc.abstractmethod
    def _fresh_state(self, device: torch.device) -> dict[str, Tensor]:
        """The state of a rule that has seen nothing."""

    @property
    def live_state(self) -> dict[str, Tensor]:
        """The state itself, no copy; empty before the first step."""
        return self._state

    def _on(self, device: torch.device) -> dict[str, Tensor]:
        """The state, on `device`. Moving it there, once after a checkpoint was loaded, may synchronise."""
        if not self._state:
            self._state = self._fresh_state(device)
        elif next(iter(self._state.values())).device != device:
            self._state = {name: value.to(device) for name, value in self._state.items()}
        return self._state

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the state, on the device; empty before the first step."""
        return {name: value.clone() for name, value in self._state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from `state`.

        Raises:
            CheckpointError: it was saved by another rule or with another window.
        """
        fresh = self._fresh_state(next((value.device for value in state.values()), torch.device("cpu")))
        expected = {name: value.shape for name, value in fresh.items()}
        found = {name: value.shape for name, value in state.items()}
        if not found.items() <= expected.items():
            raise CheckpointError(
                f"the spike rule's state has {_described(found)}",
                rule=f"{type(self).__name__} with these settings has {_described(expected)}",
                remedy="resume with the spike rule and window that the run was saved with",
            )
        # What an earlier version did not save begins afresh.
        known = {**fresh, **state} if state else {}
        self._state = {name: value.detach().clone() for name, value in known.items()}


def _described(shapes: Mapping[str, torch.Size]) -> str:
    return ", ".join(f"{name}{list(shape)}" for name, shape in shapes.items())


def shifted(window: Tensor, newest: Tensor) -> Tensor:
    """`window` `[..., W]` without its oldest entry (the first) and with `newest` `[...]` as its last."""
    return torch.cat([window[..., 1:], newest.unsqueeze(-1)], dim=-1)


def no_limit(like: Tensor) -> Tensor:
    """The norm limit of a rule that does not clip."""
    return torch.full_like(like, torch.inf, dtype=torch.float64)
