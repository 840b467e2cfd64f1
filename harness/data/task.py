"""What is trained: a model, its loss and its data, bundled as a `Task`.

`load_task` finds one that somebody else wrote.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.config import TrainConfig, checked_arguments
from harness.errors import ConfigError
from harness.user_code import load_function, made_by_user, user_code

__all__ = ["Batch", "Dataset", "LossSum", "Task", "TaskBuilder", "cross_entropy", "load_task", "run_loss"]

Batch = dict[str, Tensor]
"""Tensors by name; the first dimension of each counts samples. What else a sample holds, such as strings or
nested dicts, is in it as `torch.utils.data.default_collate` arranges it."""

IGNORED = -100
"""Target that is not counted: padding. The value is `torch.nn.functional.cross_entropy`'s own default."""


@dataclass(frozen=True, slots=True)
class LossSum:
    """A loss that is still a sum, so that means over ranks and micro-batches can be taken exactly.

    Tensors have one element, and are 0-d once they are in here; nothing waits for a device.

    Raises:
        ConfigError: something else was given.
    """

    total: Tensor
    """Sum of the loss over `count` tokens (or samples); carries the gradient."""
    count: Tensor | float
    """How many tokens (or samples) are in `total`; a tensor on any device, or a plain number."""
    correct: Tensor | float = 0
    """How many of them were predicted right; 0 where nothing is right or wrong."""
    by_part: Tensor | None = None
    """Of a task with `parts`: `[parts, 2]`, total and count of each, without a gradient; None: not known."""

    def __post_init__(self) -> None:
        if not isinstance(self.total, Tensor) or not self.total.is_floating_point():
            raise _not_one(
                "total", self.total, "it is a tensor of a floating dtype, which carries the gradient"
            )
        for name in ("total", "count", "correct"):
            object.__setattr__(self, name, _one(name, getattr(self, name)))


def _one(name: str, value: Any) -> Tensor | float:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.reshape(())
    if isinstance(value, int | float):
        return value
    if isinstance(value, np.ndarray | np.generic) and value.size == 1:
        return float(value.item())
    raise _not_one(name, value, "it is one number for the whole micro-batch")


def _not_one(name: str, value: Any, rule: str) -> ConfigError:
    return ConfigError(
        f"LossSum.{name} is {_described(value)}",
        rule=rule,
        remedy="take the .sum() over all tokens (or samples)" if isinstance(value, Tensor) else "",
    )


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)} and dtype {str(value.dtype).removeprefix('torch.')}"
    return "None" if value is None else f"a {type(value).__name__}"


class Dataset(Protocol):
    """Map-style data. A sample is a dict of tensors, arrays, numbers or strings.

    A dataset may also have `__getitems__(indices: list[int])`, which fetches a micro-batch at once and
    returns a list of samples or a ready `Batch`; `fingerprint() -> str`, which tells its content from any
    other's and is used instead of looking at a few samples; and `source_of(index: int) -> str`, which says
    where a sample comes from (a file and an offset, a row's id, a URL) without reading it, with
    `index_of(source: str) -> int | None` for the way back, or `indices_of(sources) -> {source: [index, ...]}`
    for many at once: by that name incidents and `data.quarantine` speak of samples.
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
    """On the CPU, freshly initialised from torch's global generator. In eval mode as a whole, as pretrained
    models come, it is put in train mode, but for submodules without a trainable parameter."""
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
    parts: tuple[str, ...] = ()
    """Names of what the data consists of, such as sources, if `LossSum.by_part` tells their losses apart."""
    pinned: Mapping[str, str] = field(default_factory=dict)
    """What a run goes on only with besides its data, such as the digest of a tokenizer, by name: the same on
    all ranks, kept in every checkpoint, and not covered by `data.allow_change`."""
    keep: Callable[[Path], None] | None = None
    """Called on rank 0 with the run's directory before the first step of each attempt: writes into it what
    later attempts need."""


TaskBuilder = Callable[[TrainConfig], Task]


def run_loss(task: Task, model: nn.Module, batch: Batch) -> LossSum:
    """The loss of `task` on a micro-batch that is on the model's device.

    Raises:
        TaskError: it raised something.
        ConfigError: it returned something else than a `LossSum`.
    """
    with user_code(f"the loss {_name(task.loss)}", rule="it takes (model, batch) and returns a LossSum"):
        loss = task.loss(model, batch)
    if not isinstance(loss, LossSum):
        raise ConfigError(
            f"the loss {_name(task.loss)} returned {_described(loss)}",
            rule="it returns a harness.data.LossSum: a sum, and over how many tokens or samples",
            remedy="for a mean over n of them return LossSum(total=mean * n, count=n)",
        )
    return loss


def _name(function: object) -> str:
    return getattr(function, "__qualname__", type(function).__qualname__)


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
        The function, called with the configuration and `task_args`, and made to raise `ConfigError` where
        these are not what it takes, or where it does not return a `Task`.

    Raises:
        ConfigError: there is no such module or no such function.
    """
    function = load_function(spec, key="task")

    def build(config: TrainConfig) -> Task:
        make = functools.partial(function, **checked_arguments(function, config.task_args))
        rule = "its function takes the TrainConfig and returns a harness.data.Task"
        return made_by_user(f"task {spec!r}", make, config, kind=Task, rule=rule)

    return build
