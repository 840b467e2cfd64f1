"""Whether modules are in training mode where they train, and in eval mode where they are evaluated."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from harness.stability.audits.base import Audit, Found, Scene
from harness.stability.audits.forward import is_active_in_training

__all__ = ["EvaluationModeAudit", "TrainingModeAudit"]

MIN_QUIET_STEPS = 5
"""Steps without a forward pass between them, after which several of them at once are an evaluation: a
generator that is sampled from, or a policy that acts, is called between most steps."""


class TrainingModeAudit(Audit):
    """`eval()` was called and `train()` was not: dropout is off, and statistics of batches stand still."""

    name = "training mode"
    remedy = "call model.train() before the first step and after each evaluation"

    def __init__(self) -> None:
        self._first: dict[nn.Module, bool] | None = None
        """The modes of the first look, of modules for which they make a difference."""

    def look(self, scene: Scene) -> Iterable[Found]:
        modes = {module: module.training for module in scene.model.modules() if is_active_in_training(module)}
        if not modes:
            return
        if self._first is None:
            self._first = modes
            if not any(modes.values()) and not scene.model.training:
                yield Found(value=-len(modes))
            return
        stopped = [module for module, training in modes.items() if not training and self._first.get(module)]
        if stopped:
            yield Found(value=len(stopped))

    def words(self, value: int, parameter: str | None) -> str:
        if value < 0:
            return f"the model is trained in eval mode, with {-value} modules of dropout or batch norm in it"
        return f"{value} modules of dropout or batch norm that were in training mode are in eval mode now"


class EvaluationModeAudit(Audit):
    """Forward passes without a graph in training mode, now and then: held-out losses with dropout, and
    running statistics that learn from held-out data."""

    name = "evaluation mode"
    remedy = (
        "call model.eval() before an evaluation and model.train() after it; nothing is wrong if these are "
        "rollouts, or a recalibration of running statistics"
    )

    def __init__(self) -> None:
        self._num_quiet, self._num_other, self._num_passes = 0, 0, 0
        self._acts_first: bool | None = None
        """Whether there were such passes before the first step: of a policy, which acts before it learns."""

    def before_update(self, scene: Scene) -> None:
        if self._acts_first is None:
            self._acts_first = scene.forward.num_reading > 0
        if self._acts_first:
            return
        if scene.forward.num_reading == 0:
            self._num_quiet += 1
        elif self._num_quiet >= MIN_QUIET_STEPS * (1 + self._num_other):
            self._num_passes = scene.forward.num_reading
        else:
            self._num_other += 1

    def look(self, scene: Scene) -> Iterable[Found]:
        if self._num_passes > 1:
            yield Found(value=self._num_passes)

    def words(self, value: int, parameter: str | None) -> str:
        return f"{value} forward passes without gradients were made in training mode: is it an evaluation?"

    def forget(self) -> None:
        self._num_passes = 0
