"""What every audit is: a look at what this rank's host holds, without other ranks, and with the device only
to confirm it.

Legend: P parameters.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from harness.stability.audits.forward import ForwardWatch
from harness.stability.layout import Layout
from harness.stability.optimizers import Optimizers

__all__ = ["Audit", "Found", "Scene"]


class Found(NamedTuple):
    """What an audit has found, in two numbers, which travel with the step's one gather."""

    row: int = -1
    """The parameter's row in the layout; -1: none."""
    value: int = 0
    """What `Audit.words` makes a sentence of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A step as an audit sees it."""

    step: int
    model: nn.Module
    optimizers: Optimizers
    layout: Layout
    forward: ForwardWatch
    """The forward passes since the last step."""


class Audit(abc.ABC):
    """Looks on after every step, and is asked now and then what it has found.

    Each rank's own affair: no collective, no tensor's value, nothing that another rank has to do too. What it
    finds is sent with the rank's other numbers, at the same steps on all ranks.
    """

    name: ClassVar[str]
    """As findings and the documentation call it."""
    remedy: ClassVar[str]
    """What to do about it, in words."""

    def before_update(self, scene: Scene) -> None:
        """In every step: the gradients lie in the model, and the optimizer has not been stepped."""
        return

    def after_update(self, scene: Scene) -> None:
        """In every step: the optimizer has been stepped, or the step was left out."""
        return

    @abc.abstractmethod
    def look(self, scene: Scene) -> Iterable[Found]:
        """What is wrong; before the optimizer's step."""

    def confirmed(self, found: Found) -> Tensor | None:
        """0-d bool on the device, whether what `look` has found is so; None: it is. It is not read here."""
        return None

    @abc.abstractmethod
    def words(self, value: int, parameter: str | None) -> str:
        """What is wrong, as a sentence without the rank; of any rank's finding, on every rank."""

    def unseen(self, scene: Scene) -> str | None:
        """What keeps it from seeing anything in this loop, in words; None: nothing does."""
        return None

    def forget(self) -> None:
        """The run goes on from another state."""
        return

    def close(self) -> None:
        """Takes out what it has hung on the model."""
        return
