"""Finds out how a model is spread over ranks, and refuses what cannot be guarded."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from harness.errors import ConfigError
from harness.stability.backward import BackwardStatistics
from harness.stability.fsdp import FsdpSource
from harness.stability.hooks import CommHook, DdpSource
from harness.stability.layout import Layout
from harness.stability.optimizers import Optimizers
from harness.stability.sources import GradientSource, PlainSource
from harness.wrappers import uncompiled, without_wrappers

__all__ = ["layout_of", "named_parameters", "source_of"]

logger = logging.getLogger(__name__)


def layout_of(model: nn.Module, optimizers: Optimizers) -> Layout:
    """A row for each parameter of `model` that a step of the optimizers may change.

    Raises:
        ConfigError: something about the model or its optimizers' parameters that the guard cannot measure.
    """
    Layout.of(named_parameters(model), of=optimizers.held)  # whatever they hold has to be the model's
    layout = Layout.of(named_parameters(model), of=optimizers.changed)
    _check(len(layout) > 0, "the optimizer has no parameter that takes a gradient", "there has to be one")
    devices = {p.device for p in layout.parameters}
    _check(len(devices) == 1, f"parameters on {len(devices)} devices", "all have to be on one device")
    pairs = list(zip(layout.names, layout.parameters, strict=True))
    complex_ones = [name for name, p in pairs if p.is_complex()]
    _check(not complex_ones, f"complex parameters: {complex_ones}", "the guard measures real gradients")
    sparse = [name for name, module in model.named_modules() if getattr(module, "sparse", False)]
    _check(not sparse, f"sparse gradients in {sparse}", "gradients have to be dense: build with sparse=False")
    updated = [name for name, p in model.named_parameters() if hasattr(p, "_in_backward_optimizers")]
    _check(
        not updated, f"an optimizer in the backward pass of {updated}", "a verdict comes before the update"
    )
    return layout


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters under the names that the model's author gave them, shared ones under each of theirs."""
    for name, parameter in _authors_model(model).named_parameters(remove_duplicate=False):
        # A submodule compiled by itself still has its wrapper in the name.
        yield without_wrappers(name), parameter


def source_of(
    model: nn.Module,
    layout: Layout,
    *,
    comm_hook: CommHook | None,
    group: dist.ProcessGroup | None,
    in_backward: bool,
) -> GradientSource:
    """Where the gradients of `model` are measured: in buckets, before reduce-scatters, or where they lie,
    there `in_backward` or after it."""
    unwrapped = uncompiled(model)
    if isinstance(unwrapped, DistributedDataParallel):
        return DdpSource(unwrapped, layout, comm_hook=comm_hook)
    if any(isinstance(module, FSDPModule) for module in unwrapped.modules()):  # the outermost need not be one
        return FsdpSource(model, layout)
    _check(comm_hook is None, "a comm_hook without DDP", "only DDP reduces by a communication hook")
    if group is None and dist.is_initialized() and dist.get_world_size() > 1:
        logger.warning(
            "a plain model among %d ranks: this one is judged alone; wrap it in DDP or FSDP2, or, if you "
            "reduce its gradients yourself, give the guard the group",
            dist.get_world_size(),
        )
    # torch counts no change where a collective writes, and several ranks reduce somehow.
    is_alone = group is None and not (dist.is_initialized() and dist.get_world_size() > 1)
    is_plain = not any(isinstance(p, DTensor) for p in layout.parameters)
    early = BackwardStatistics() if in_backward and is_alone and is_plain else None
    return PlainSource(layout, group=group, in_backward=early)


def _authors_model(model: nn.Module) -> nn.Module:
    """The model whose parameters bear the names that its author gave them: without DDP and torch.compile."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif (inner := uncompiled(model)) is not model:
            model = inner
        else:
            return model


def _check(condition: bool, problem: str, rule: str) -> None:
    if not condition:
        raise ConfigError(problem, rule=rule)
