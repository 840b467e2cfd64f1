"""Turns sample indices into a `Batch`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import default_collate

from harness.data.task import Batch, Dataset
from harness.errors import DataError

__all__ = ["fetch"]


def fetch(dataset: Dataset, indices: Sequence[int], seeds: Sequence[int] | None = None) -> Batch:
    """Samples `indices` as one batch.

    A dataset with `__getitems__` is asked once and has to be deterministic. One without is asked sample by
    sample; before each `__getitem__` torch's generator is seeded with the sample's own seed (default: its
    index), and afterwards it is put back. So random augmentation depends on the sample's place in the run
    and on nothing else. Other generators can be seeded from `torch.initial_seed()`.

    No indices give a batch of length 0 whose tensors have the right dtypes and trailing shapes.
    """
    if not indices:
        return {name: values[:0] for name, values in fetch(dataset, [0]).items()}
    getitems = getattr(dataset, "__getitems__", None)
    if getitems is not None:
        samples = getitems(list(indices))
    else:
        samples = [_seeded_sample(dataset, *pair) for pair in zip(indices, seeds or indices, strict=True)]
    return samples if isinstance(samples, dict) else _collate(dataset, samples)


def _seeded_sample(dataset: Dataset, index: int, seed: int) -> Any:
    with _own_generator(seed):
        return dataset[index]


def _collate(dataset: Dataset, samples: Sequence[Any]) -> Batch:
    if not isinstance(samples[0], dict):
        raise DataError(
            f"a sample of {type(dataset).__name__} is a {type(samples[0]).__name__}",
            rule="samples are dicts of tensors by name, such as {'inputs': x, 'targets': y}",
        )
    batch: Batch = default_collate(list(samples))
    return batch


@contextmanager
def _own_generator(seed: int) -> Iterator[None]:
    # The CPU generator alone: torch.manual_seed would reseed every GPU as well.
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
