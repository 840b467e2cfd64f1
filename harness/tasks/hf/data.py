"""The sources of a run as one data set to train on and one that is held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from harness import env
from harness.config import DataConfig
from harness.errors import DataError
from harness.tasks.hf.encode import Encoder
from harness.tasks.hf.mixture import Mixture, Part
from harness.tasks.hf.packing import prepare_rows
from harness.tasks.hf.readers import identity, records
from harness.tasks.hf.settings import Packing, SourceSettings
from harness.tasks.hf.store import TokenStore, prepare_tokens
from harness.tasks.hf.tokenizer import tokenizer_digest

__all__ = ["Data", "load_data"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """What a task is made of."""

    train: Mixture
    val: Mixture
    labels: tuple[str, ...]
    """Of the sources."""
    bytes_per_token: float | None
    """Mean; None where not every token counts."""


def load_data(
    config: DataConfig,
    sources: Sequence[SourceSettings | None],
    tokenizer: Any,
    *,
    packing: Packing,
    answers_only: bool,
    cache_dir: Path,
) -> Data:
    """Tokens and rows of all sources, prepared if they are not in `cache_dir`.

    Raises:
        DataError: what is wrong with a source.
    """
    labels = _labels(sources)
    used, digest = tokenizer_digest(tokenizer), xxhash.xxh3_64()

    def prepared(number: int) -> TokenStore:
        source = sources[number]
        kind = ["auto", ""] if source is None else [source.kind, source.column]
        return prepare_tokens(
            [identity(source), kind, used, answers_only],
            records(source),
            Encoder(tokenizer, source, answers_only=answers_only),
            vocab_size=len(tokenizer),
            cache_dir=cache_dir,
            label=labels[number],
        )

    # Each rank of a machine begins with another source, so that several are prepared at once.
    first = env.launched().local_rank % len(sources)
    by_number = {number: prepared(number) for number in (*range(first, len(sources)), *range(first))}
    stores = [by_number[number] for number in range(len(sources))]
    train: list[Part] = []
    val: list[Part] = []
    for number, (source, store) in enumerate(zip(sources, stores, strict=True)):
        use = "split" if source is None else source.use
        weight = 0.0 if source is None else source.weight
        rows = prepare_rows(
            store, length=config.sequence_length, packing=packing, use=use, val_frac=config.val_frac
        )
        digest.update(f"{store.digest} {use} {weight}".encode())
        train.append(Part(store, rows[0], number, weight))
        val.append(Part(store, rows[1], number))
    whole_digest = f"{packing}-{config.sequence_length}-{config.val_frac}-{digest.hexdigest()}"
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    length = config.sequence_length
    return Data(
        train=Mixture(train, length=length, pad=pad, digest=whole_digest),
        val=Mixture(val, length=length, pad=pad, digest=whole_digest),
        labels=labels,
        bytes_per_token=_bytes_per_token(stores),
    )


def _labels(sources: Sequence[SourceSettings | None]) -> tuple[str, ...]:
    labels = tuple("standard library" if source is None else source.label for source in sources)
    for label in labels:
        if labels.count(label) > 1:
            raise DataError(
                f"two sources are called {label!r}",
                rule="metrics tell sources apart by their names",
                remedy="give them other names in task_args.sources",
            )
    return labels


def _bytes_per_token(stores: Sequence[TokenStore]) -> float | None:
    if any(store.counted is not None for store in stores):
        return None
    num_targets = sum(len(store.tokens) - len(store.ends) for store in stores)
    return sum(store.num_bytes for store in stores) / max(num_targets, 1)
