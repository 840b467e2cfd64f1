"""A model's modules and sizes in words, and its traced graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.errors import TrackingError
from harness.tracking.media import save_media

__all__ = ["count_parameters", "describe", "trace"]


def count_parameters(model: nn.Module) -> dict[str, int]:
    """How many parameters there are, and how many of them are trained; shared ones once."""
    parameters = list(model.parameters())
    return {
        "num_parameters": sum(p.numel() for p in parameters),
        "num_trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
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

    Raises:
        TrackingError: the model cannot be traced with this input.
    """
    from harness.tracking.tensorboard import trace_graph

    was_training = model.training
    try:
        with torch.no_grad():
            graph = trace_graph(model.eval(), example_input)
    except (RuntimeError, TypeError, ValueError) as error:
        raise TrackingError(f"the graph of {type(model).__name__} cannot be traced: {error}") from error
    finally:
        model.train(was_training)
    return save_media(run_dir, graph, "graph")


def _own(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters(recurse=False))


def _shapes(module: nn.Module) -> str:
    return ", ".join(f"{name} {tuple(p.shape)}" for name, p in module.named_parameters(recurse=False))
