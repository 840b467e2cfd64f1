"""The model: by name, or of a configuration; with adapters where they are asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.data import Batch, LossSum, cross_entropy
from harness.data.alive import working
from harness.data.task import IGNORED
from harness.errors import ConfigError, needs
from harness.tasks.hf.settings import LoraSettings, ModelSettings

__all__ = ["TokenLoss", "add_adapters", "check_documents_apart", "load_model"]


def load_model(settings: ModelSettings, *, vocab_size: int | None = None) -> Any:
    """A causal language model on the CPU, in train mode.

    Args:
        vocab_size: Tokens of the tokenizer; None: it is not known.

    Raises:
        ConfigError: there is no such model, it needs a package that is not installed, or it has fewer tokens
            than the tokenizer.
    """
    with needs("transformers", extra="hf"):
        from transformers import AutoConfig, AutoModelForCausalLM
    dtype = settings.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    try:
        if settings.name:
            with working():
                model = AutoModelForCausalLM.from_pretrained(
                    settings.name,
                    revision=settings.revision or "main",
                    dtype=dtype,
                    attn_implementation=settings.attention,
                )
        else:
            fields = {"vocab_size": vocab_size, **settings.config} if vocab_size else settings.config
            config = AutoConfig.for_model(**fields)
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=torch.float32 if dtype == "auto" else dtype,
                attn_implementation=settings.attention,
            )
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"the model {settings.name or settings.config!r} cannot be made: {_first_line(error)}",
            rule="it is a folder or a name on the Hub, or fields of a configuration of transformers",
            remedy="check task_args.model; without a network, name a folder",
        ) from error
    except ImportError as error:
        package = "flash-attn" if settings.attention == "flash_attention_2" else "the package"
        raise ConfigError(
            f"the model {settings.name or settings.config!r} with attention {settings.attention} cannot be "
            f"made: {_first_line(error)}",
            rule="what a model and its attention are computed with has to be installed",
            remedy=f"install {package}, or set task_args.model.attention sdpa",
        ) from error
    rows = model.get_input_embeddings().num_embeddings
    if vocab_size is not None and rows < vocab_size:
        raise ConfigError(
            f"the model has {rows} tokens and the tokenizer {vocab_size}",
            rule="each token of the tokenizer has a row in the embedding",
            remedy="use the model's own tokenizer, or a config without vocab_size",
        )
    model.config.use_cache = False
    model.train()  # which `from_pretrained` does not return, and what peft wraps around it would hide
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def add_adapters(model: Any, settings: LoraSettings) -> Any:
    """The model with LoRA's adapters by peft, its own parameters frozen; as it was where the rank is 0.

    Raises:
        ConfigError: it has no such layers.
    """
    if settings.r == 0:
        return model
    with needs("peft", extra="hf"):
        from peft import LoraConfig, get_peft_model
        from transformers.pytorch_utils import Conv1D
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets) or "all-linear",
        modules_to_save=list(settings.train_also) or None,
        task_type="CAUSAL_LM",
        # GPT-2's linear layers, whose weights lie the other way round.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(
            f"the adapters cannot be added: {_first_line(error)}",
            rule="task_args.lora.targets are names of the model's linear layers",
        ) from error


def check_documents_apart(model: nn.Module, *, length: int) -> None:
    """Runs two rows that differ in their first document alone: the second one's logits have to be the same.

    A few tokens on the CPU; nothing is drawn from the global generators.

    Raises:
        ConfigError: they are not: the model does not tell documents apart by their positions.
    """
    count = min(8, length // 2)
    if count < 2:
        return
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 100, (1, 2 * count), generator=generator).repeat(2, 1)
    tokens[1, :count] = (tokens[1, :count] + 1) % 100
    positions = torch.arange(count).repeat(2, 2)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=tokens, position_ids=positions, use_cache=False).logits[:, count:]
    model.train(was_training)
    largest, difference = logits.abs().max(), (logits[0] - logits[1]).abs().max()
    if difference > 8 * torch.finfo(logits.dtype).eps * largest:
        raise ConfigError(
            f"{type(model).__name__} sees earlier documents of a packed row",
            rule="packed documents are told apart by position ids that begin again at 0",
            remedy="set task_args.packing off, or another task_args.model.attention",
        )


class TokenLoss:
    """Summed cross entropy of the targets that count, and of each of several sources by itself."""

    def __init__(self, num_sources: int) -> None:
        self._num_sources = num_sources

    def __call__(self, model: nn.Module, batch: Batch) -> LossSum:
        logits = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
        if self._num_sources < 2:
            return cross_entropy(logits, batch["targets"])
        return self._of_sources(logits, batch)

    def _of_sources(self, logits: Tensor, batch: Batch) -> LossSum:
        """With float64 `[num_sources, 2]`, total and count of each."""
        targets = batch["targets"]
        losses = F.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none"
        ).view_as(targets)
        with torch.no_grad():
            counted = (targets != IGNORED).sum(1)
            rows = torch.stack([losses.sum(1, dtype=torch.float64), counted.double()], 1)
            sums = torch.zeros(self._num_sources, 2, dtype=torch.float64, device=logits.device)
            sums.index_add_(0, batch["source"], rows)
            correct = (logits.argmax(dim=-1) == targets).sum()
        return LossSum(losses.sum(), counted.sum(), correct, sums)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
