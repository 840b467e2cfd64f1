"""A model's modules and sizes in words, and its traced graph."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from harness.errors import TrackingError
from harness.tracking.media import save_media
from harness.wrappers import uncompiled

__all__ = ["count_parameters", "describe", "trace"]


def count_parameters(model: nn.Module) -> dict[str, int]:
    """How many parameters there are, and how many of them are trained; shared ones once, lazy ones not
    before they are initialised."""
    parameters = list(model.parameters())
    return {
        "num_parameters": sum(map(_size, parameters)),
        "num_trainable_parameters": sum(_size(p) for p in parameters if p.requires_grad),
    }


def describe(model: nn.Module) -> str:
    """A Markdown table of all modules with parameters of their own, and the model as torch prints it."""
    rows = [
        f"| {name or '(model)'} | {type(module).__name__} | {_shapes(module)} | {_own(module):,} |"
        for name, module in model.named_modules()
        if _own(module)
    ]
    total = count_parameters(model)["num_parameters"]
    head = ["| module | kind | shapes | parameters |", "|---|---|---|---|"]
    return "\n".join([*head, *rows, f"| total | | | {total:,} |", "", "```", str(model), "```"])


def trace(model: nn.Module, example_input: Any, run_dir: Path) -> str:
    """Traces the model's graph into a file for TensorBoard; returns its path within the run directory.

    The model runs in evaluation mode; afterwards every module is in the mode it was in, and the generators
    of random numbers are as they were. What DDP or `torch.compile` have wrapped is traced without them, for
    only this rank runs it.

    Raises:
        TrackingError: the model cannot be traced with this input.
    """
    from harness.tracking.tensorboard import trace_graph

    modes = {module: module.training for module in model.modules()}
    bare = _unwrapped(model)
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    try:
        with warnings.catch_warnings(), torch.no_grad(), torch.random.fork_rng(devices):
            warnings.simplefilter("ignore")  # of what tracing cannot see: the picture is only a picture
            graph = trace_graph(bare.eval(), example_input)
    except Exception as error:  # the user's forward, and torch's tracer, may fail in any way
        raise TrackingError(f"the graph of {type(bare).__name__} cannot be traced: {error}") from error
    finally:
        for module, was_training in modes.items():
            module.training = was_training
    return save_media(run_dir, graph, "graph")


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif (inner := uncompiled(model)) is not model:
            model = inner
        else:
            return model


def _size(parameter: nn.Parameter) -> int:
    return 0 if is_lazy(parameter) else parameter.numel()


def _own(module: nn.Module) -> int:
    return sum(map(_size, module.parameters(recurse=False)))


def _shapes(module: nn.Module) -> str:
    return ", ".join(
        f"{name} {tuple(p.shape)}" for name, p in module.named_parameters(recurse=False) if not is_lazy(p)
    )
