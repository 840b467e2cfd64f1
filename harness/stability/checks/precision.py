"""Whether the arithmetic is done in the precision that was asked for: a census of one step's matmuls."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from harness.config import GuardConfig
from harness.records import Finding
from harness.stability.checks.base import Arrived, Check, Reading, StepView

__all__ = ["PrecisionCheck"]

STEP = 1
"""The one that is looked at."""

MATMULS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_mm")

MIN_SHARE = 0.5


class PrecisionCheck(Check):
    """In one step, where the loop uses `StepGuard.watch_forward`; of a compiled model it sees nothing."""

    name = "precision"

    def __init__(self, config: GuardConfig) -> None:
        self.every = 1 if config.silent_errors == "on" else 0
        self._census: _Census | None = None

    def is_due(self, step: int) -> bool:
        return self.every > 0 and step == STEP

    @contextmanager
    def watch_forward(self) -> Iterator[None]:
        self._census = self._census or _Census()
        with self._census:
            yield

    def measure(self, view: StepView) -> Tensor | None:
        """`[2]` float64: operations in the precision that was asked for, and in all."""
        census, self._census = self._census, None
        if census is None or view.precision == torch.float32:
            return None
        counted = census.num_operations
        asked = [counted.get(view.precision, 0.0), sum(counted.values())]
        host = torch.tensor(asked, dtype=torch.float64, pin_memory=view.rows.is_cuda)
        return host.to(view.rows.device, non_blocking=True)

    def read(self, numbers: Tensor, arrived: Arrived) -> Reading:
        """Of `[W, 2]`."""
        asked, total = numbers.sum(0).tolist()
        if not total or asked / total >= MIN_SHARE:
            return Reading()
        finding = Finding(
            check=self.name,
            problem=f"{100 * (1 - asked / total):.0f} % of the matmuls' operations are not made in the "
            "precision that the guard was told",
            remedy="run the forward pass within autocast, or tell the guard the true precision",
        )
        return Reading(findings=[finding])

    def forget(self) -> None:
        self._census = None


class _Census(TorchDispatchMode):
    """Counts multiplications of matmuls by the type of what goes in."""

    def __init__(self) -> None:
        super().__init__()
        self.num_operations: dict[torch.dtype, float] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.__name__.split(".")[0] in MATMULS and isinstance(result, Tensor):
            operands = [one for one in args if isinstance(one, Tensor) and one.dim() > 1]
            if operands:
                name = function.__name__.split(".")[0]
                # addmm and baddbmm have what is added first, _scaled_mm scales last, convolution a bias.
                second = operands[1] if name in ("convolution", "_scaled_mm") else operands[-1]
                size = math.prod(second.shape[1:]) if name == "convolution" else second.shape[-2]
                # What goes into _scaled_mm is fp8; what it is asked for is the type that comes out.
                dtype = result.dtype if name == "_scaled_mm" else second.dtype
                counted = self.num_operations.get(dtype, 0.0)
                self.num_operations[dtype] = counted + float(result.numel()) * size
        return result
