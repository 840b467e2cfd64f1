"""The tokenizer: the run's own, or else by name, of the model's folder, or trained on the sources.

A run keeps the one that it began with in its directory: what is trained on files is another one when they
have changed, and so may be what a name stands for.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash

from harness.data.alive import working
from harness.data.prepared import build_folder, prepared_folder, put_aside
from harness.errors import ConfigError, needs
from harness.tasks.hf.encode import text_of
from harness.tasks.hf.readers import identity, records
from harness.tasks.hf.settings import ModelSettings, SourceSettings, TokenizerSettings

__all__ = ["keep_tokenizer", "load_tokenizer", "tokenizer_digest"]

logger = logging.getLogger(__name__)

_TRAINED_ON_CHARS = 4 << 20
_END, _PAD = "<|end|>", "<|pad|>"
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_SAMPLE = (
    "The quick brown fox doesn't jump; I'LL wait...  3.14159 = 1,234,567?\n\n"
    "\tif (x != y) {\r\n    return a[0]; }"
    " caf\u00e9 cafe\u0301 \ufb01ne \uff21\uff22 Stra\u00dfe \u0130 na\u00efve \u00a0\u200b\u3000end "
    "\u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u0645\u0631\u062d\u0628\u0627 "
    "\u0939\u093f\u0928\u094d\u0926\u0940 "
    "\u65e5\u672c\u8a9e\u3067\u3059\u3002 \ud55c\uad6d\uc5b4 \U0001f469\u200d\U0001f4bb <s> </s> <|x|>   "
)
"""Text of many kinds, by which what is done before and after the vocabulary shows."""
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


def load_tokenizer(
    settings: TokenizerSettings,
    model: ModelSettings,
    sources: Sequence[SourceSettings | None],
    *,
    cache_dir: Path,
    kept: Path | None = None,
    or_settings: bool = False,
) -> Any:
    """The tokenizer of a run, or the one that the settings ask for.

    Args:
        cache_dir: Where one that is trained is kept between runs.
        kept: Folder of `keep_tokenizer`, whose tokenizer is taken if it is there.
        or_settings: Where the kept one cannot be read, the settings hold; `tokenizer_digest` tells whether
            they give the same one.

    Raises:
        ConfigError: there is none of that name, or the kept one cannot be read.
        DataError: the sources cannot be read, or `cache_dir` cannot be written.
    """
    if kept is not None and kept.is_dir():
        try:
            return _from_folder(kept)
        except ConfigError as error:
            if not or_settings:
                raise
            logger.warning("%s; taking the one that the settings ask for", error.problem)
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
    _forget_lengths(tokenizer)
    # As it comes back from a folder: what goes on later has this very one.
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return _from_folder(Path(folder))


def keep_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Saves it as `folder`, whole or not at all, unless there is one; one that cannot be read is put aside.

    Raises:
        OSError: it cannot be written.
    """
    if folder.is_dir() and not _is_readable(folder):
        put_aside(folder)
    if not folder.is_dir():
        build_folder(folder, tokenizer.save_pretrained)


def tokenizer_digest(tokenizer: Any) -> str:
    """What tells it, its chat template included, from any other that gives other tokens.

    It is not of its files, which another release of tokenizers or transformers writes differently, nor of
    truncation and padding, which each use sets anew.
    """
    special = [getattr(tokenizer, f"{role}_token_id", None) for role in _SPECIAL]
    described = [
        sorted(tokenizer.get_vocab().items()),
        _ranked(tokenizer),
        str(tokenizer.chat_template),
        special,
        sorted(set(tokenizer.all_special_ids)),
        tokenizer(_SAMPLE, verbose=False)["input_ids"],
    ]
    return xxhash.xxh3_64_hexdigest(json.dumps(described).encode())


def _ranked(tokenizer: Any) -> list[Any]:
    """What of the vocabulary is preferred: the merges of a BPE, the scores of a unigram model."""
    backend = _backend(tokenizer)
    model = json.loads(backend.to_str())["model"] if backend is not None else {}
    scores = model["vocab"] if isinstance(model.get("vocab"), list) else []
    # A pair is a string in files of older releases.
    return [[one.split(" ") if isinstance(one, str) else one for one in model.get("merges", ())], scores]


def _backend(tokenizer: Any) -> Any:
    """Its `tokenizers.Tokenizer`; None where it is written in Python."""
    return getattr(tokenizer, "backend_tokenizer", None)


def _forget_lengths(tokenizer: Any) -> None:
    """Drops truncation and padding, which depend on how it was used last."""
    backend = _backend(tokenizer)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()


def _of_name(name: str, revision: str | None) -> Any:
    try:
        with working():
            return _auto_tokenizer().from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the tokenizer {name!r} cannot be loaded: {str(error).strip().splitlines()[0]}",
            rule="it is a folder that a tokenizer was saved in, or a name on the Hub",
            remedy="check task_args.tokenizer.name; without a network, name a folder",
        ) from error


def _is_readable(folder: Path) -> bool:
    try:
        _from_folder(folder)
    except ConfigError:
        return False
    return True


def _from_folder(folder: Path) -> Any:
    with needs("transformers", extra="hf"):
        from transformers import AutoTokenizer
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizers raises that one itself where a file is damaged
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ConfigError(
            f"the tokenizer in {folder} cannot be loaded: {reason}",
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
