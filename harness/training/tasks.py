"""The bundled tasks, put together from data and models, and the door to tasks of one's own."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from harness import env
from harness.config import TrainConfig
from harness.data import (
    SourceFile,
    Task,
    check_task,
    class_loss,
    load_images,
    load_task,
    load_text,
    next_byte_loss,
    seed_everything,
)
from harness.models import build_model, training_flops_per_token
from harness.training.float8 import use_float8

__all__ = ["build_task"]

_OF_OTHERS = {"hf": "harness.tasks.hf:build"}
"""Tasks with a name of their own that are found as a user's are."""

logger = logging.getLogger(__name__)


def build_task(config: TrainConfig, *, files: Sequence[SourceFile] | None = None) -> Task:
    """The task that `config.task` names, with a freshly initialised model on the CPU, in train mode.

    Whatever is drawn, from torch, numpy or Python, follows `config.seed`, so every rank builds the same model
    and the same split of the data. No collectives.

    Args:
        files: Of task text: what `agree_on_files` gave; None: list them here.

    Raises:
        DataError: the data is missing, unreadable or too short.
        ConfigError: a task of one's own cannot be imported, or returns what cannot be trained.
        TaskError: its code raised something.
    """
    seed_everything(config.seed)
    task = _built(config, files)
    if config.loop.float8:
        on_cuda = config.parallel.device != "cpu" and torch.cuda.is_available()
        use_float8(task.model, torch.device("cuda" if on_cuda else "cpu"))
    return task


def _built(config: TrainConfig, files: Sequence[SourceFile] | None) -> Task:
    if config.task == "text":
        return _text_task(config, files)
    if config.task == "images":
        return _image_task(config)
    task = load_task(_OF_OTHERS.get(config.task, config.task))(config)
    check_task(task)
    _put_in_train_mode(task.model)
    return task


def _put_in_train_mode(model: nn.Module) -> None:
    """A model that is in eval mode as a whole is put in train mode, but for submodules without a trainable
    parameter. One that is in train mode is left as it is, submodules in eval mode included."""
    if model.training:
        return
    model.train()
    frozen = {name: module for name, module in model.named_modules() if _is_frozen(module)}
    for module in frozen.values():
        module.eval()
    outermost = [name or "the model" for name in frozen if name.rpartition(".")[0] not in frozen or not name]
    if outermost:
        more = f" and {len(outermost) - 3} more" if len(outermost) > 3 else ""
        left = f", but for what has no trainable parameter: {', '.join(outermost[:3])}{more}"
    logger.info("the task's model came in eval mode and is put in train mode%s", left if outermost else "")


def _is_frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def _text_task(config: TrainConfig, files: Sequence[SourceFile] | None) -> Task:
    cache_dir = Path(config.data.cache_dir) if config.data.cache_dir else env.cache_dir()
    train_data, val_data = load_text(config.data, cache_dir=cache_dir, files=files)
    length = config.data.sequence_length
    model = build_model(config.model, sequence_length=length)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return Task(
        model=model,
        loss=next_byte_loss,
        train_data=train_data,
        val_data=val_data,
        tokens_per_sample=length,
        bytes_per_token=1.0,
        flops_per_token=training_flops_per_token(
            config.model, num_parameters=num_parameters, sequence_length=length
        ),
        accuracy_of="next byte",
    )


def _image_task(config: TrainConfig) -> Task:
    train_data, val_data = load_images(config.data)
    return Task(
        model=build_model(
            config.model, num_classes=train_data.num_classes, image_shape=train_data.image_shape
        ),
        loss=class_loss,
        train_data=train_data,
        val_data=val_data,
    )
