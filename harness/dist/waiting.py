"""How long a rank stands in FSDP2's collectives, where they hold up the host: on CPUs, with gloo."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

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
                reduce_scatter = _Timed(group._reduce_scatter_comm, note)
                module.set_custom_reduce_scatter(reduce_scatter)  # type: ignore[arg-type]
                if _has_replicas(module):
                    module.set_all_reduce_hook(reduce_scatter.note_since)


def _has_replicas(module: nn.Module) -> bool:
    parameter = next(module.parameters())
    return isinstance(parameter, DTensor) and parameter.device_mesh.ndim > 1


class _Timed:
    """A collective of FSDP2, and how long it takes."""

    def __init__(self, inner: Any, note: Callable[[float], None]) -> None:
        self._inner, self._note = inner, note
        self._ended = 0.0

    def allocate(self, *args: Any, **kwargs: Any) -> Tensor:
        memory: Tensor = self._inner.allocate(*args, **kwargs)
        return memory

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        work = self._inner(*args, **kwargs)
        self._ended = time.perf_counter()
        self._note(self._ended - start)
        return work

    def note_since(self, reduced: Tensor) -> None:
        """The all-reduce over the copies of the model, which follows at once, has ended."""
        self._note(time.perf_counter() - self._ended)
