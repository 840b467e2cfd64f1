"""How long a rank stands in FSDP2's collectives, where they hold up the host: on CPUs, with gloo."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

__all__ = ["time_collectives"]


def time_collectives(model: nn.Module, note: Callable[[float], None]) -> None:
    """Has `note` called with the seconds of each all-gather and reduce-scatter of an FSDP2 model on CPUs.

    They go on as before. To be called before a guard is made, which wraps what it finds. Of other models and
    devices nothing is timed: there the host does not wait in them.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule) and next(module.parameters()).device.type == "cpu":
            group: Any = module._get_fsdp_state()._fsdp_param_group
            if group is not None:
                module.set_custom_all_gather(_Timed(group._all_gather_comm, note))  # type: ignore[arg-type]
                module.set_custom_reduce_scatter(_Timed(group._reduce_scatter_comm, note))  # type: ignore[arg-type]


class _Timed:
    """A collective of FSDP2, and how long it takes."""

    def __init__(self, inner: Any, note: Callable[[float], None]) -> None:
        self._inner, self._note = inner, note

    def allocate(self, *args: Any, **kwargs: Any) -> Tensor:
        memory: Tensor = self._inner.allocate(*args, **kwargs)
        return memory

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        work = self._inner(*args, **kwargs)
        self._note(time.perf_counter() - start)
        return work
