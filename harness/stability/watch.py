"""Which parameters a guard answers for: what its optimizers hold, followed from step to step."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from weakref import WeakSet

from torch import nn

from harness.errors import ConfigError
from harness.stability.attach import layout_of
from harness.stability.layout import Layout
from harness.stability.optimizers import Optimizers
from harness.stability.sources import GradientSource

__all__ = ["Watch", "guarded_parameters"]

logger = logging.getLogger(__name__)


class Watch:
    """The layout of what may change in a step. A parameter is in one watch: a later claim takes it over.

    Args:
        on_close: A method to call when it is closed.

    Raises:
        ConfigError: something about the model or its optimizers that cannot be guarded.
    """

    def __init__(self, model: nn.Module, optimizers: Optimizers, *, on_close: Callable[[], None]) -> None:
        self._model, self._optimizers = model, optimizers
        self._on_close = weakref.WeakMethod(on_close)  # the guard holds this watch
        self._signature: tuple[object, ...] = ()
        self.closed_because: str | None = None
        """Why it was closed, if it was."""
        self._read_optimizers()

    def follow(self) -> bool:
        """Looks at the optimizers anew; whether they hold anything else than before.

        Raises:
            ConfigError: what they hold now cannot be guarded.
        """
        if self._optimizers.signature == self._signature:
            return False
        self._read_optimizers()
        return True

    def require_reduced(self, source: GradientSource) -> None:
        """Refuses what each rank would change in its own way.

        Raises:
            ConfigError: a parameter takes a gradient that the reduction does not cover; on all ranks alike.
        """
        unreduced = source.unreduced_parameters()
        if unreduced:
            names = [self.layout.names[self.layout.row_of[id(p)]] for p in unreduced]
            raise ConfigError(
                f"the gradients of {_listed(names)} are not reduced over the ranks",
                rule="DDP reduces what took a gradient when it was made, and each rank would go its own way",
                remedy="thaw or add parameters first and make the DistributedDataParallel then",
            )

    def close(self, reason: str) -> None:
        """Lets go of the parameters; the first reason counts."""
        self.closed_because = self.closed_because or reason
        _watches.discard(self)
        on_close = self._on_close()
        if on_close is not None:
            on_close()

    def _read_optimizers(self) -> None:
        self._optimizers.refuse_shared()
        self._signature_of_layout = self._optimizers.signature
        self.layout = layout_of(self._model, self._optimizers)

    def claim(self) -> None:
        """Makes the parameters of the layout this watch's, and closes what watched any of them before, with a
        warning. Until then `follow` finds them changed: an error on the way must not let the next step pass.
        """
        self._signature = self._signature_of_layout
        for other in list(_watches):
            names = [other.layout.names[row] for row in _shared_rows(other.layout, self.layout)]
            if other is not self and names:
                logger.warning(
                    "an earlier guard is closed: a later one watches %s too; to step both optimizers, make"
                    " one guard of them: StepGuard(model, [a, b])",
                    _listed(names),
                )
                other.close("a later guard watches its parameters")
        _watches.add(self)


def guarded_parameters() -> set[int]:
    """The `id`s of what all guards together step."""
    return {row for watch in _watches for row in watch.layout.row_of}


_watches: WeakSet[Watch] = WeakSet()
"""Those that are open."""


def _shared_rows(layout: Layout, other: Layout) -> list[int]:
    """The rows of a layout whose parameters are in the other one too."""
    return [row for key, row in layout.row_of.items() if key in other.row_of]


def _listed(names: Sequence[str], num: int = 3) -> str:
    more = f" and {len(names) - num} more" if len(names) > num else ""
    return ", ".join(names[:num]) + more
