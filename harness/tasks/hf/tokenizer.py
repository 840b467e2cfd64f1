"""The tokenizer: by name, of the model's folder, or trained on the sources."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash

from harness.data.prepared import prepared_folder
from harness.errors import ConfigError, needs
from harness.tasks.hf.encode import text_of
from harness.tasks.hf.readers import identity, records
from harness.tasks.hf.settings import ModelSettings, SourceSettings, TokenizerSettings

__all__ = ["load_tokenizer", "tokenizer_digest"]

_TRAINED_ON_CHARS = 4 << 20
_END, _PAD = "<|end|>", "<|pad|>"
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def load_tokenizer(
    settings: TokenizerSettings,
    model: ModelSettings,
    sources: Sequence[SourceSettings | None],
    *,
    cache_dir: Path,
) -> Any:
    """The tokenizer that the settings ask for.

    Args:
        cache_dir: Where one that is trained is kept between runs.

    Raises:
        ConfigError: there is none of that name.
        DataError: the sources cannot be read, or `cache_dir` cannot be written.
    """
    with needs("transformers", extra="hf"):
        from transformers import AutoTokenizer
    name = settings.name or model.name
    if settings.train_vocab_size:
        name = str(_trained(settings.train_vocab_size, sources, cache_dir))
    if not name:
        raise ConfigError(
            "there is no tokenizer",
            rule="a model of a config has none of its own",
            remedy="set task_args.tokenizer.name or task_args.tokenizer.train_vocab_size",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=None if settings.name else model.revision)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the tokenizer {name!r} cannot be loaded: {str(error).strip().splitlines()[0]}",
            rule="it is a folder that a tokenizer was saved in, or a name on the Hub",
            remedy="check task_args.tokenizer.name; without a network, name a folder",
        ) from error
    if settings.chat_template:
        try:
            tokenizer.chat_template = Path(settings.chat_template).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"cannot read the chat template {settings.chat_template}: {error.strerror}"
            ) from error
    return tokenizer


def tokenizer_digest(tokenizer: Any) -> str:
    """What tells it, its chat template included, from any other that gives other tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    special = sorted((name, str(value)) for name, value in tokenizer.special_tokens_map.items())
    return xxhash.xxh3_64_hexdigest(json.dumps([content, str(tokenizer.chat_template), special]).encode())


def _trained(vocab_size: int, sources: Sequence[SourceSettings | None], cache_dir: Path) -> Path:
    described = json.dumps([1, vocab_size, [identity(source) for source in sources]])
    folder = cache_dir / f"tokenizer-{xxhash.xxh3_64_hexdigest(described.encode())}"
    return prepared_folder(folder, lambda unfinished: _train(vocab_size, sources, unfinished))


def _train(vocab_size: int, sources: Sequence[SourceSettings | None], folder: Path) -> None:
    """Byte-level BPE, as of GPT-2, with the marks of a chat."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_END, _PAD, *_ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(sources), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=_END, pad_token=_PAD, chat_template=_CHAT_TEMPLATE
    )
    wrapped.save_pretrained(folder)


def _texts(sources: Sequence[SourceSettings | None]) -> Iterator[str]:
    """An equal share of each source."""
    for source in sources:
        left = _TRAINED_ON_CHARS // len(sources)
        for record in records(source):
            text = text_of(record)[:left]
            left -= len(text)
            yield text
            if left <= 0:
                break
