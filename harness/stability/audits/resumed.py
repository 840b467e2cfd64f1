"""Whether a run that goes on in the middle has its optimizer's state too."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from harness.stability.audits.base import Audit, Found, Scene

__all__ = ["ResumedAudit"]


class ResumedAudit(Audit):
    """The guard was resumed at a later step, and the optimizer begins without its moments. One that keeps no
    state, as plain SGD does, has nothing to lose."""

    name = "resumed"
    remedy = "load the optimizer's state with the model's, into the optimizer that the guard has"

    def __init__(self) -> None:
        self._is_first, self._began_empty, self._has_state = True, False, False

    def before_update(self, scene: Scene) -> None:
        if self._is_first:
            self._is_first = False
            self._began_empty = scene.step > 0 and not _has_state(scene)

    def after_update(self, scene: Scene) -> None:
        self._has_state = self._has_state or (self._began_empty and _has_state(scene))

    def look(self, scene: Scene) -> Iterable[Found]:
        if self._began_empty and self._has_state:
            yield Found()

    def words(self, value: int, parameter: str | None) -> str:
        return "the guard goes on in the middle of a run, and its optimizer began without any state"

    def forget(self) -> None:
        self._is_first, self._began_empty, self._has_state = True, False, False


def _has_state(scene: Scene) -> bool:
    states = map(scene.optimizers.state_of, scene.layout.parameters)
    return any(isinstance(value, Tensor) for state in states for value in state.values())
