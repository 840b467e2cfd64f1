"""`--task hf`: causal language models of transformers on text and chats.

Its parts, from the bottom up: `settings` (what can be set), `readers` (records of files and datasets),
`encode` (record to tokens, and which of them count), `tokenizer`, `store` (tokens on disk), `packing`
(documents to rows), `mixture` (rows of all sources as one data set), `data`, `model`, `export` (weights out).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness import env
from harness.config import TrainConfig
from harness.data import Task
from harness.errors import ConfigError
from harness.runlog.paths import tokenizer_dir
from harness.tasks.hf.settings import (
    LoraSettings,
    ModelSettings,
    Packing,
    SourceSettings,
    TokenizerSettings,
)

__all__ = ["build"]

_WHOLE = TokenizerSettings()
_NO_ADAPTERS = LoraSettings()


def build(
    config: TrainConfig,
    *,
    model: ModelSettings,
    tokenizer: TokenizerSettings = _WHOLE,
    sources: tuple[SourceSettings, ...] = (),
    packing: Packing = "whole",
    answers_only: bool = True,
    lora: LoraSettings = _NO_ADAPTERS,
) -> Task:
    """A causal language model on rows of `data.sequence_length` tokens.

    Args:
        model: By name or of a configuration.
        tokenizer: The model's, unless said otherwise.
        sources: What is trained on and held out; none: the Python standard library's source.
        packing: whole: as many documents in a row as have room, uncut unless longer than a row; cut: one
            after the other, cut where the row ends; off: one in a row. Those of a row do not see each other.
        answers_only: In chats and pairs, whether the answers alone count in the loss.
        lora: Adapters instead of all parameters.

    Raises:
        ConfigError, DataError: what is wrong with a setting, a file or a record.
    """
    if packing != "off" and model.attention == "flash_attention_2":
        raise ConfigError(
            f"task_args.packing is {packing} and task_args.model.attention flash_attention_2",
            rule="it tells the documents of a row apart in micro-batches of one row only; in others they"
            " would see each other",
            remedy="set task_args.packing off, or task_args.model.attention sdpa or flex_attention",
        )
    from harness.tasks.hf.data import load_data
    from harness.tasks.hf.model import TokenLoss, add_adapters, check_documents_apart, load_model
    from harness.tasks.hf.tokenizer import keep_tokenizer, load_tokenizer, tokenizer_digest

    # Unset, tokenizers warn in each loader worker, none of which tokenises.
    env.set_default("TOKENIZERS_PARALLELISM", "true")
    cache_dir = Path(config.data.cache_dir) if config.data.cache_dir else env.cache_dir()
    made_of: tuple[SourceSettings | None, ...] = sources or (None,)
    kept = tokenizer_dir(Path(config.runs_dir, config.name))
    used = load_tokenizer(tokenizer, model, made_of, cache_dir=cache_dir, kept=kept, or_settings=True)
    data = load_data(
        config.data, made_of, used, packing=packing, answers_only=answers_only, cache_dir=cache_dir
    )
    network = load_model(model, vocab_size=len(used))
    _check_length(network, config.data.sequence_length)
    if packing != "off":
        check_documents_apart(network, length=config.data.sequence_length)
    return Task(
        model=add_adapters(network, lora),
        loss=TokenLoss(len(made_of)),
        train_data=data.train,
        val_data=data.val,
        tokens_per_sample=config.data.sequence_length,
        bytes_per_token=data.bytes_per_token,
        accuracy_of="next token",
        parts=data.labels if len(data.labels) > 1 else (),
        pinned={"tokenizer": tokenizer_digest(used)},
        keep=lambda directory: keep_tokenizer(used, tokenizer_dir(directory)),
    )


def _check_length(network: Any, length: int) -> None:
    longest = getattr(network.config, "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise ConfigError(
            f"data.sequence_length is {length}",
            rule=f"the model has {longest} positions",
            remedy="lower it, or set max_position_embeddings in task_args.model.config",
        )
