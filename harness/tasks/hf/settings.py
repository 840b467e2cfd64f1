"""`task_args` of `--task hf`, section by section."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from harness.config.checks import require, require_not_negative, require_positive

__all__ = ["LoraSettings", "ModelSettings", "Packing", "SourceSettings", "TokenizerSettings"]

Packing = Literal["whole", "cut", "off"]


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """`model`: a causal language model of transformers."""

    SECTION = "task_args.model"

    name: str = ""
    """A folder, or a name on the Hub: `from_pretrained`."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    config: dict[str, Any] = field(default_factory=dict)
    """Instead of a name: `model_type`, and fields of that type's configuration. Weights are random;
    `vocab_size` is the tokenizer's unless given."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Of the parameters; auto: as they were saved. `loop.precision` is that of the computation."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"
    """transformers' `attn_implementation`."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass, for less memory."""

    def __post_init__(self) -> None:
        require(
            self,
            "name",
            bool(self.name) != bool(self.config),
            "a model is either loaded by its name or made from a config",
            "set one of task_args.model.name and task_args.model.config",
        )
        require(
            self,
            "config",
            not self.config or "model_type" in self.config,
            "it has a model_type, such as llama",
        )


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """`tokenizer`: the model's own, another, or one that is trained on the text."""

    SECTION = "task_args.tokenizer"

    name: str = ""
    """A folder, or a name on the Hub; empty: the model's."""
    train_vocab_size: int = 0
    """Train one of so many tokens (byte-level BPE) on the first megabytes of the sources; 0: do not."""
    chat_template: str = ""
    """A file with another Jinja template than the tokenizer's own."""

    def __post_init__(self) -> None:
        require(
            self,
            "train_vocab_size",
            self.train_vocab_size == 0 or self.train_vocab_size > 260,
            "it has to be more than the 256 bytes and 4 special tokens, or 0",
        )


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """An item of `sources`."""

    SECTION = "task_args.sources"

    path: str = ""
    """A file or a folder: text, .jsonl, .parquet, or a folder that `datasets` has saved."""
    dataset: str = ""
    """Instead of a path: a name for `datasets.load_dataset`."""
    subset: str | None = None
    """Of a dataset that has several."""
    split: str = "train"
    """Of a dataset, or of a folder that has several."""
    name: str = ""
    """What metrics call it; default: the last part of the path or of the dataset's name."""
    weight: float = 0.0
    """Share of this source in the samples, relative to the others'; 0 for all: each sample once an epoch."""
    kind: Literal["auto", "text", "chat", "pairs"] = "auto"
    """text: a column `text`; chat: `messages`; pairs: `prompt` and `completion`; auto: what is there."""
    column: str = ""
    """Of the text or the messages, where it has another name."""
    use: Literal["split", "train", "val"] = "split"
    """split: `data.val_frac` of the documents are held out; train, val: all of them are for that."""
    limit: int = 0
    """Documents to read; 0: all."""

    def __post_init__(self) -> None:
        require(
            self,
            "path",
            bool(self.path) != bool(self.dataset),
            "a source is either a path or a dataset",
            "set one of path and dataset",
        )
        require(
            self,
            "name",
            re.fullmatch(r"[\w.-]*", self.name) is not None,
            "it consists of letters, digits, dots, hyphens and underscores",
        )
        require_not_negative(self, "weight", "limit")

    @property
    def label(self) -> str:
        """What metrics call it."""
        last = (self.path or self.dataset).rstrip("/").rpartition("/")[2]
        return self.name or re.sub(r"[^\w.-]", "_", last)


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """`lora`: adapters by peft, and the model's own parameters frozen."""

    SECTION = "task_args.lora"

    r: int = 0
    """Rank; 0: all parameters are trained."""
    alpha: float = 16.0
    """Scale of the adapters, over r."""
    dropout: float = 0.0
    """Dropout probability before the adapters."""
    targets: tuple[str, ...] = ()
    """Names of the layers; default: all linear layers but the output."""
    train_also: tuple[str, ...] = ()
    """Modules that are trained whole and saved with the adapters, such as `lm_head`."""

    def __post_init__(self) -> None:
        require_not_negative(self, "r")
        require_positive(self, "alpha")
        require(self, "dropout", 0 <= self.dropout < 1, "it has to lie in [0, 1)")
