"""Whether the model that the guard was given is the one that the loop calls, and with batches that agree."""

from __future__ import annotations

from collections.abc import Iterable

from harness.stability.audits.base import Audit, Found, Scene
from harness.wrappers import uncompiled

__all__ = ["BatchAudit", "CalledAudit"]

MIN_STEPS = 5


class CalledAudit(Audit):
    """The compiled model is made, and the plain one is called. (Of DDP and FSDP2 the gradients tell it.)"""

    name = "wrapper"
    remedy = "call the compiled model in the loop"

    def __init__(self) -> None:
        self._num_uncalled, self._num_called = 0, 0

    def before_update(self, scene: Scene) -> None:
        called = scene.forward.num_training > 0
        self._num_called += called
        self._num_uncalled += not called

    def look(self, scene: Scene) -> Iterable[Found]:
        is_wrapped = uncompiled(scene.model) is not scene.model
        if is_wrapped and not self._num_called and self._num_uncalled >= MIN_STEPS:
            yield Found(value=self._num_uncalled)

    def words(self, value: int, parameter: str | None) -> str:
        return f"the compiled model was not called in {value} steps: the loop trains the plain one"

    def unseen(self, scene: Scene) -> str | None:
        return (
            None if self._num_called else "the guard's model is not called itself: its batches are not seen"
        )


class BatchAudit(Audit):
    """Inputs and labels of a batch are of different numbers of samples."""

    name = "batch"
    remedy = "look at how the batch is collated"

    def __init__(self) -> None:
        self._lengths: tuple[int, int] | None = None

    def before_update(self, scene: Scene) -> None:
        self._lengths = self._lengths or scene.forward.lengths

    def look(self, scene: Scene) -> Iterable[Found]:
        if self._lengths is not None:
            yield Found(value=self._lengths[0] * 2**31 + self._lengths[1])

    def words(self, value: int, parameter: str | None) -> str:
        inputs, labels = divmod(value, 2**31)
        return f"a batch has {inputs} inputs and {labels} labels"
