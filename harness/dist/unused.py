"""Parameters that a step's loss does not depend on, under DDP: found on the rank on which it happens, reported on all.

DDP reduces a bucket of gradients when all of its parameters have one. A parameter that took no part in the loss
leaves the bucket unreduced: if on all ranks, DDP refuses the next forward pass; if on some, the others wait for ever.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from harness.dist.agreement import gather
from harness.errors import ConfigError
from harness.wrappers import without_wrappers

__all__ = ["UnusedParameters"]

SHOWN = 6
"""Names that an error lists."""


class UnusedParameters:
    """Watches the backward passes of a DDP model that does not look for unused parameters itself.

    Of any other model it watches nothing. One call into Python per parameter and backward pass; never synchronises.
    """

    def __init__(self, model: nn.Module) -> None:
        self.found: dict[str, None] = {}
        """Names of the parameters that this rank had no gradient of, in the order in which they were missed."""
        self._names: dict[nn.Parameter, str] = {}
        self._ready: set[torch.Tensor] = set()
        if isinstance(model, DistributedDataParallel) and not model.find_unused_parameters:
            named = model.module.named_parameters()
            self._names = {p: without_wrappers(name) for name, p in named if p.requires_grad}
        for parameter in self._names:
            parameter.register_post_accumulate_grad_hook(self._ready.add)

    @contextmanager
    def completing(self, *, reduces: bool) -> Iterator[None]:
        """Put a backward pass into it. If it `reduces` gradients, the reduction ends on all ranks: a parameter that
        it did not reach gets zeros, which is what its gradient is. One that no micro-batch of the step reached is
        noted in `found`."""
        self._ready.clear()
        yield
        if not reduces or len(self._ready) == len(self._names):
            return
        missing = [parameter for parameter in self._names if parameter not in self._ready]
        self.found.update((self._names[parameter], None) for parameter in missing if parameter.grad is None)
        torch.autograd.backward(missing, [torch.zeros_like(parameter) for parameter in missing])

    def refuse(self) -> None:
        """Raises what was found on any rank. All ranks call it together: a collective on the host.

        Raises:
            ConfigError: anything was; the same error on every rank.
        """
        found = gather(lambda: list(self.found))
        if any(found):
            raise ConfigError(
                f"the loss does not depend on {_places(found)}",
                rule="DDP reduces the gradient of every parameter in every step",
                remedy="use them in the loss, take requires_grad from them, or set --parallel.find_unused true",
            )


def _places(found: list[list[str]]) -> str:
    """`a.weight, a.bias; on rank 1 only b.weight`."""
    everywhere = [name for name in found[0] if all(name in names for names in found)]
    own: Mapping[int, list[str]] = {
        rank: [name for name in names if name not in everywhere] for rank, names in enumerate(found)
    }
    parts = [_listed(everywhere)] if everywhere else []
    return "; ".join(parts + [f"{_listed(names)} on rank {rank}" for rank, names in own.items() if names])


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
