"""Whether every parameter that takes a gradient is in an optimizer that a guard steps."""

from __future__ import annotations

from collections.abc import Iterable

from harness.stability.attach import named_parameters
from harness.stability.audits.base import Audit, Found, Scene
from harness.stability.watch import guarded_parameters

__all__ = ["CoverageAudit"]


class CoverageAudit(Audit):
    """Gradients are taken and never used. Over all guards together: encoder and head may have one each."""

    name = "coverage"
    remedy = "give them to an optimizer that is guarded, or requires_grad_(False) saves the work"

    def __init__(self) -> None:
        self._names: list[str] = []

    def look(self, scene: Scene) -> Iterable[Found]:
        guarded = guarded_parameters()
        named = named_parameters(scene.model)
        self._names = [name for name, p in named if p.requires_grad and id(p) not in guarded]
        if self._names:
            yield Found(value=len(self._names))

    def words(self, value: int, parameter: str | None) -> str:
        # The model is the same on all ranks, and so are these names.
        return (
            f"no guarded optimizer holds {_listed(self._names) or f'{value} parameters'}, so the gradients "
            "taken there are neither measured nor used"
        )


def _listed(names: list[str], num: int = 3) -> str:
    more = f" and {len(names) - num} more" if len(names) > num else ""
    return ", ".join(names[:num]) + more
