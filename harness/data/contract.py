"""What a task has to be, checked before anything is done with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn
from torch.nn.parameter import is_lazy

from harness.data.task import Task
from harness.errors import ConfigError, DataError
from harness.user_code import user_code

__all__ = ["check_task"]

_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def check_task(task: Task) -> None:
    """Checks all fields of `task`; reads the lengths of its data, and none of it.

    Raises:
        ConfigError, DataError: a field is not what `Task` says.
        TaskError: a data set's `__len__` raised something.
    """
    _check_model(task.model)
    _require(callable(task.loss), "loss", task.loss, "it is a function (model, batch) -> LossSum")
    for name in ("train_data", "val_data"):
        _check_data(name, getattr(task, name))
    _require(
        isinstance(task.tokens_per_sample, int | np.integer) and task.tokens_per_sample > 0,
        "tokens_per_sample",
        task.tokens_per_sample,
        "it is a whole number of at least 1",
    )
    for name in ("bytes_per_token", "flops_per_token"):
        value = getattr(task, name)
        positive = bool(isinstance(value, int | float | np.number) and math.isfinite(value) and value > 0)
        _require(value is None or positive, name, value, "it is None or a number greater than 0")
    _require(isinstance(task.accuracy_of, str), "accuracy_of", task.accuracy_of, "it is a word or two")
    are_names = isinstance(task.parts, tuple) and all(isinstance(name, str) for name in task.parts)
    _require(are_names, "parts", task.parts, "it is a tuple of names")
    are_texts = isinstance(task.pinned, Mapping) and all(
        isinstance(text, str) for pair in task.pinned.items() for text in pair
    )
    _require(are_texts, "pinned", task.pinned, "it is a mapping of names to texts")
    _require(task.keep is None or callable(task.keep), "keep", task.keep, "it is None or a function (Path)")


def _check_model(model: Any) -> None:
    _require(isinstance(model, nn.Module), "model", model, "it is a torch.nn.Module")
    kind = type(model).__name__
    _require(
        not isinstance(model, _WRAPPERS), "model", kind, "it comes unwrapped; the run distributes it itself"
    )
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        _require(
            not is_lazy(parameter),
            "model",
            kind,
            f"its parameter {name} has no shape yet; run a batch through it",
        )
        _require(
            not parameter.is_meta,
            "model",
            kind,
            f"its parameter {name} is on the meta device, without values",
        )
    _require(
        any(parameter.requires_grad for parameter in parameters.values()),
        "model",
        kind,
        "at least one of its parameters requires a gradient",
    )


def _check_data(name: str, data: Any) -> None:
    kind = type(data).__name__
    usable = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    _require(
        usable,
        name,
        kind,
        "it has a length and [index]; a stream of samples would have no place to resume at",
    )
    with user_code(f"len({kind})", rule="it is the number of samples, and the same on all ranks"):
        num_samples = len(data)
    if num_samples == 0:
        raise DataError(f"the task's {name} has no samples", rule="there has to be at least one")


def _require(condition: bool, name: str, value: object, rule: str) -> None:
    if not condition:
        raise ConfigError(f"the task's {name} is {value!r}", rule=rule)
