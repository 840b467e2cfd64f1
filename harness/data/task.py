"""What is trained: a model, its loss and its data, bundled as a `Task`.

`load_task` finds one that somebody else wrote.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.config.schema import TrainConfig
from harness.errors import ConfigError

__all__ = ["Batch", "Dataset", "LossSum", "Task", "TaskBuilder", "cross_entropy", "load_task"]

Batch = dict[str, Tensor]
"""Tensors by name; the first dimension of each counts samples."""

IGNORED = -100
"""Target that is not counted: padding. The value is `torch.nn.functional.cross_entropy`'s own default."""


@dataclass(frozen=True, slots=True)
class LossSum:
    """A loss that is still a sum, so that means over ranks and micro-batches can be taken exactly.

    All three are 0-d tensors on the model's device; nothing here waits for it.
    """

    total: Tensor
    """Sum of the loss over `count` tokens (or samples); carries the gradient."""
    count: Tensor
    """How many tokens (or samples) are in `total`; int64."""
    correct: Tensor
    """How many of them were predicted right; int64."""


class Dataset(Protocol):
    """Map-style data. A sample is a dict of tensors, arrays or numbers.

    A dataset may also have `__getitems__(indices: list[int])`, which fetches a micro-batch at once and
    returns a list of samples or a ready `Batch`.
    """

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """Sample `index`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a task's `build(config)` returns."""

    model: nn.Module
    """On the CPU, freshly initialised from torch's global generator."""
    loss: Callable[[nn.Module, Batch], LossSum]
    """Runs the model on a micro-batch. It has to be a sum over tokens or samples, never a mean."""
    train_data: Dataset
    """Samples to learn from."""
    val_data: Dataset
    """Held-out samples."""
    tokens_per_sample: int = 1
    """What one sample without padding adds to `LossSum.count`; 1 where samples are counted."""
    bytes_per_token: float | None = None
    """Mean bytes of text per token, to report bits per byte; None where that means nothing."""
    flops_per_token: float | None = None
    """Floating-point operations of training per token, for the model FLOPs utilisation; None: unknown."""
    accuracy_of: str = "class"
    """What `LossSum.correct` counts, in words: next byte, class."""


TaskBuilder = Callable[[TrainConfig], Task]


def cross_entropy(logits: Tensor, targets: Tensor) -> LossSum:
    """Summed cross entropy over all targets that are not -100 (padding).

    Args:
        logits: `[..., classes]`, any floating dtype; the loss is taken in float32.
        targets: `[...]`, int64.
    """
    logits = logits.flatten(0, -2)
    targets = targets.flatten()
    total = F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")
    with torch.no_grad():
        # A padded target is -100 and no prediction is, so it never counts as right.
        correct = (logits.argmax(dim=-1) == targets).sum()
        count = (targets != IGNORED).sum()
    return LossSum(total, count, correct)


def load_task(spec: str) -> TaskBuilder:
    """Finds `package.module:function`, with the current directory importable under every launcher.

    Returns:
        The function, made to raise `ConfigError` unless it returns a `Task`.

    Raises:
        ConfigError: there is no such module or no such function.
    """
    module_name, _, function_name = spec.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), function_name]):
        raise ConfigError(f"task is {spec!r}", rule="it has to be package.module:function")
    module = _import(spec, module_name)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(
            f"task {spec!r}: {module.__name__} has no function {function_name!r}",
            remedy=_nearest(module, function_name),
        )

    def build(config: TrainConfig) -> Task:
        task = function(config)
        if not isinstance(task, Task):
            raise ConfigError(
                f"task {spec!r} returned {type(task).__name__}",
                rule="its function takes the TrainConfig and returns a harness.data.Task",
            )
        return task

    return build


def _import(spec: str, module_name: str) -> ModuleType:
    # Launchers put the program's own folder on the path; people expect the one they stand in.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"task {spec!r}: there is no module {error.name!r}",
            rule="it is package.module:function, importable from the current directory or installed",
            remedy=f"start from the folder that holds it (this is {here}), or install it",
        ) from error


def _nearest(module: ModuleType, name: str) -> str:
    functions = [other for other, value in vars(module).items() if callable(value) and other[0] != "_"]
    close = difflib.get_close_matches(name, functions, n=1)
    return f"did you mean {module.__name__}:{close[0]}?" if close else ""
