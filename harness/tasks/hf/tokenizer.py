"""The tokenizer: the run's own, or else by name, of the model's folder, or trained on the sources.

A run keeps the one that it began with in its directory: what is trained on files is another one when they
have changed, and so may be what a name stands for.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash

from harness.data.prepared import build_folder, prepared_folder
from harness.errors import ConfigError, needs
from harness.tasks.hf.encode import text_of
from harness.tasks.hf.readers import identity, records
from harness.tasks.hf.settings import ModelSettings, SourceSettings, TokenizerSettings

__all__ = ["keep_tokenizer", "load_tokenizer", "tokenizer_digest"]

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
    kept: Path | None = None,
) -> Any:
    """The tokenizer of a run, or the one that the settings ask for.

    Args:
        cache_dir: Where one that is trained is kept between runs.
        kept: Folder of `keep_tokenizer`, whose tokenizer is taken if it is there.

    Raises:
        ConfigError: there is none of that name, or the kept one cannot be read.
        DataError: the sources cannot be read, or `cache_dir` cannot be written.
    """
    if kept is not None and kept.is_dir():
        return _from_folder(kept)
    name = settings.name or model.name
    if settings.train_vocab_size:
        name = str(_trained(settings.train_vocab_size, sources, cache_dir))
    if not name:
        raise ConfigError(
            "there is no tokenizer",
            rule="a model of a config has none of its own",
            remedy="set task_args.tokenizer.name or task_args.tokenizer.train_vocab_size",
        )
    tokenizer = _of_name(name, None if settings.name else model.revision)
    if settings.chat_template:
        try:
            tokenizer.chat_template = Path(settings.chat_template).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"cannot read the chat template {settings.chat_template}: {error.strerror}"
            ) from error
    # As it comes back from a folder: what goes on later has this very one.
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return _from_folder(Path(folder))


def keep_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Saves it as `folder`, whole or not at all, unless there is one.

    Raises:
        OSError: it cannot be written.
    """
    if not folder.is_dir():
        build_folder(folder, tokenizer.save_pretrained)


def tokenizer_digest(tokenizer: Any) -> str:
    """What tells it, its chat template included, from any other that gives other tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    special = sorted((name, str(value)) for name, value in tokenizer.special_tokens_map.items())
    return xxhash.xxh3_64_hexdigest(json.dumps([content, str(tokenizer.chat_template), special]).encode())


def _of_name(name: str, revision: str | None) -> Any:
    try:
        return _auto_tokenizer().from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the tokenizer {name!r} cannot be loaded: {str(error).strip().splitlines()[0]}",
            rule="it is a folder that a tokenizer was saved in, or a name on the Hub",
            remedy="check task_args.tokenizer.name; without a network, name a folder",
        ) from error


def _from_folder(folder: Path) -> Any:
    try:
        return _auto_tokenizer().from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the tokenizer in {folder} cannot be loaded: {str(error).strip().splitlines()[0]}",
            rule="a run is trained and exported with the tokenizer that it began with",
            remedy="bring the files back; if there is no checkpoint yet, delete the folder",
        ) from error


def _auto_tokenizer() -> Any:
    with needs("transformers", extra="hf"):
        from transformers import AutoTokenizer
    return AutoTokenizer


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
