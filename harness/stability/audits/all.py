"""All audits as one check: what the hosts of all ranks have found travels in the step's one gather."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from harness.config import GuardConfig
from harness.records import Finding
from harness.stability.audits.base import Audit, Found, Scene
from harness.stability.audits.cleared import ClearedAudit
from harness.stability.audits.coverage import CoverageAudit
from harness.stability.audits.evaluation import EvaluationAudit
from harness.stability.audits.forward import ForwardWatch
from harness.stability.audits.modes import EvaluationModeAudit, TrainingModeAudit
from harness.stability.audits.outside import OutsideAudit
from harness.stability.audits.parameters import AttributesAudit, FrozenAudit, MembershipAudit, TiesAudit
from harness.stability.audits.rate import RateAudit
from harness.stability.audits.resumed import ResumedAudit
from harness.stability.audits.wrapper import BatchAudit, CalledAudit
from harness.stability.checks.base import Arrived, Check, Reading, StepView
from harness.stability.checks.cadence import is_look
from harness.stability.optimizers import Optimizers
from harness.stability.rank_words import on_ranks

__all__ = ["AUDITS", "AuditsCheck"]

AUDITS: tuple[Callable[[], Audit], ...] = (
    CoverageAudit,
    MembershipAudit,
    TiesAudit,
    FrozenAudit,
    AttributesAudit,
    ClearedAudit,
    OutsideAudit,
    CalledAudit,
    BatchAudit,
    TrainingModeAudit,
    EvaluationModeAudit,
    EvaluationAudit,
    RateAudit,
    ResumedAudit,
)
"""The place in it is what travels."""

MAX_FOUND = 4
"""That a rank says at one look; what is left comes with the next."""


class AuditsCheck(Check):
    """Asks every audit at the same steps on all ranks. No collective of its own, and no wait."""

    name = "audits"
    every_step = True

    def __init__(self, config: GuardConfig, forward: ForwardWatch) -> None:
        self._forward = forward
        self.every = 1 if config.silent_errors == "on" else 0
        self.every_step = self.every > 0
        self._audits: tuple[Audit, ...] = tuple(make() for make in AUDITS)
        self._sent: set[tuple[int, Found]] = set()

    def attach(self, model: nn.Module, optimizers: Optimizers) -> None:
        if self.every:
            self._model, self._optimizers = model, optimizers

    def is_due(self, step: int) -> bool:
        return self.every > 0 and is_look(step)

    @contextmanager
    def watch_evaluation(self) -> Iterator[None]:
        """Around an evaluation: what it leaves behind is found."""
        audit = next(one for one in self._audits if isinstance(one, EvaluationAudit))
        if not self.every:
            yield
            return
        in_training_mode = self._forward.num_reading
        with audit.watching(self._model):
            yield
        if self._forward.num_reading > in_training_mode:
            audit.note_forward()

    def observe(self, view: StepView) -> None:
        scene = self._scene(view)
        for audit in self._audits:
            audit.before_update(scene)

    def after_update(self, view: StepView) -> None:
        scene = self._scene(view)
        for audit in self._audits:
            audit.after_update(scene)

    def measure(self, view: StepView) -> Tensor:
        """`[MAX_FOUND, 3]` int64: number of the audit plus 1 (0: nothing), row, value."""
        scene = self._scene(view)
        new = [
            (number, found)
            for number, audit in enumerate(self._audits)
            for found in audit.look(scene)
            if (number, found._replace(value=0)) not in self._sent
        ][:MAX_FOUND]
        self._sent.update((number, found._replace(value=0)) for number, found in new)
        table = [[number + 1, *found] for number, found in new] + [[0, 0, 0]] * (MAX_FOUND - len(new))
        device = view.rows.device
        host = torch.tensor(table, dtype=torch.int64, pin_memory=device.type == "cuda")
        sent = host.to(device, non_blocking=True)
        for place, (number, found) in enumerate(new):
            confirmed = self._audits[number].confirmed(found)
            if confirmed is not None:
                sent[place] *= confirmed.to(device)
        return sent

    def read(self, numbers: Tensor, arrived: Arrived) -> Reading:
        """Of `[W, MAX_FOUND, 3]`."""
        ranks_of: dict[tuple[int, int], list[int]] = {}
        value_of: dict[tuple[int, int], int] = {}
        for rank, found in enumerate(numbers.tolist()):
            for number, row, value in found:
                if number:
                    ranks_of.setdefault((number - 1, row), []).append(rank)
                    value_of.setdefault((number - 1, row), value)
        return Reading(
            findings=[
                self._finding(number, row, value_of[number, row], ranks, arrived, len(numbers))
                for (number, row), ranks in ranks_of.items()
            ]
        )

    def forget(self) -> None:
        for audit in self._audits:
            audit.forget()

    def close(self) -> None:
        for audit in self._audits:
            audit.close()

    def unseen(self, view: StepView) -> list[str]:
        scene = self._scene(view)
        return [f"{audit.name} ({why})" for audit in self._audits if (why := audit.unseen(scene))]

    def _finding(
        self, number: int, row: int, value: int, ranks: list[int], arrived: Arrived, num_ranks: int
    ) -> Finding:
        audit = self._audits[number]
        names = arrived.layout.names
        parameter = names[row] if 0 <= row < len(names) else None
        return Finding(
            check=audit.name,
            problem=audit.words(value, parameter) + on_ranks(ranks, num_ranks),
            remedy=audit.remedy,
            rank=ranks[0] if len(ranks) == 1 else None,
            parameter=parameter,
        )

    def _scene(self, view: StepView) -> Scene:
        return Scene(
            step=view.step,
            model=self._model,
            optimizers=self._optimizers,
            layout=view.layout,
            forward=self._forward,
        )
