"""Whether buffers that nobody changes are the same on all ranks: masks, tables of positions, scales.

Statistics of batches differ between ranks by design, and are left alone: they change from look to look.

Legend: W ranks, B buffers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from harness.config import GuardConfig
from harness.records import Finding
from harness.stability.checks.base import Arrived, Check, Reading, StepView
from harness.stability.checks.cadence import is_look
from harness.stability.checks.fingerprint import fingerprint
from harness.stability.optimizers import Optimizers
from harness.stability.rank_words import on_ranks

__all__ = ["ConstantsCheck"]


class ConstantsCheck(Check):
    """Looks at up to 4,096 elements of each buffer, every eleven steps, where there are several ranks."""

    name = "constants"

    def __init__(self, config: GuardConfig) -> None:
        self.every = 1 if config.silent_errors == "on" else 0
        self._before: tuple[int, Tensor] | None = None
        """Step and numbers of the look before."""

    def attach(self, model: nn.Module, optimizers: Optimizers) -> None:
        self._model = model

    def is_due(self, step: int) -> bool:
        return self.every > 0 and is_look(step)

    def measure(self, view: StepView) -> Tensor | None:
        """`[B]` int64; None where there is nothing to compare."""
        device = view.rows.device
        buffers = [buffer for _, buffer in self._buffers()]
        if view.num_replicas < 2 or not buffers:
            return None
        return torch.stack([fingerprint(one).to(device, non_blocking=True) for one in buffers])

    def read(self, numbers: Tensor, arrived: Arrived) -> Reading:
        """Of `[W, B]`."""
        before, self._before = self._before, (arrived.step, numbers)
        if before is None or before[1].shape != numbers.shape or before[0] == arrived.step:
            return Reading()
        constant = (before[1] == numbers).all(0)
        differing = (constant & (numbers != numbers[:1]).any(0)).nonzero().flatten().tolist()
        if not differing:
            return Reading()
        names = [name for name, _ in self._buffers()]
        column = differing[0]
        values = numbers[:, column].tolist()
        common = max(set(values), key=values.count)
        ranks = [rank for rank, value in enumerate(values) if value != common]
        name = names[column] if column < len(names) else "a buffer"
        finding = Finding(
            check=self.name,
            problem=f"the buffer {name} never changes and is another one" + on_ranks(ranks, len(values)),
            remedy="make or load it alike on all ranks, from one seed",
            rank=ranks[0] if len(ranks) == 1 and len(values) > 2 else None,
            parameter=name,
        )
        return Reading(findings=[finding])

    def forget(self) -> None:
        self._before = None

    def _buffers(self) -> list[tuple[str, Tensor]]:
        return [
            (name, b) for name, b in self._model.named_buffers() if b.numel() and b.layout == torch.strided
        ]
