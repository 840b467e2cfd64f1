"""What tells a data set from any other: compared between ranks, and between the attempts of a run."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import xxhash
from torch.utils.data import DataLoader, Subset

from harness.data.fetch import fetch, worker_failure
from harness.data.task import Dataset
from harness.errors import HarnessError
from harness.user_code import user_code

__all__ = ["fingerprint"]

logger = logging.getLogger(__name__)

_NUM_SAMPLES = 16
"""Enough to tell another shuffle, split or file. One changed sample among many is seen by a
`fingerprint()` of the data set's own only."""


def fingerprint(dataset: Dataset, *, in_worker: bool = False) -> str:
    """`dataset`'s length and what its `fingerprint()` gives, else a hash of some of its samples.

    The samples are the first, the last and others evenly between. They are fetched twice: those that are not
    the same twice, because they are drawn from a generator of the data set's own, do not count. They are
    computed on one thread, as in a worker: a sum's last bits depend on the number of threads.

    Args:
        in_worker: Fetch in a process of its own, as the loader's workers do: a file that a data set opens at
            the first sample must not be open in this process when they are forked from it.

    Raises:
        TaskError, DataError: the dataset cannot be fetched from.
    """
    if hasattr(dataset, "fingerprint"):
        with user_code(f"{type(dataset).__name__}.fingerprint", rule="it returns a string"):
            own = dataset.fingerprint
            return f"{len(dataset)} samples {own() if callable(own) else own}"
    return f"{len(dataset)} samples {_in_worker(dataset) if in_worker else _hash_of_samples(dataset)}"


def _hash_of_samples(dataset: Dataset) -> str:
    num_samples = len(dataset)
    count = min(_NUM_SAMPLES, num_samples)
    chosen = sorted({place * (num_samples - 1) // max(count - 1, 1) for place in range(count)})
    with _one_thread():
        first, second = (_hash(fetch(dataset, [index]) for index in chosen) for _ in range(2))
    if first == second:
        return f"{first}{_hash_of_indices(dataset)}"
    logger.info(
        "samples of %s are others each time they are fetched: it draws from a generator of its own, which is"
        " neither seeded per sample nor restored; draw from torch's, numpy's or Python's global one",
        type(dataset).__name__,
    )
    return f"drawn anew each time{_hash_of_indices(dataset)}"


def _hash_of_indices(dataset: Any) -> str:
    """Of `torch.utils.data.random_split` and the like all indices count."""
    if not isinstance(dataset, Subset):
        return ""
    return f"-{xxhash.xxh3_64_hexdigest(_packed(dataset.indices))}{_hash_of_indices(dataset.dataset)}"


def _packed(indices: Any) -> bytes:
    """The same for a list, an array, a range and a tensor."""
    try:
        return np.asarray(indices, dtype=np.int64).tobytes()
    except (TypeError, ValueError, OverflowError):  # keys of another kind, or on a GPU
        return _hash(indices).encode()


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _hash(values: Iterable[Any]) -> str:
    digest = xxhash.xxh3_64()
    for value in values:
        _add(digest, value)
    return digest.hexdigest()


def _add(digest: xxhash.xxh3_64, value: Any) -> None:
    digest.update(type(value).__name__.encode())
    if isinstance(value, dict):
        for key in value:
            digest.update(str(key).encode())
            _add(digest, value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            _add(digest, item)
    elif isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        if value.layout == torch.strided and value.numel():
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, str | bytes | int | float | np.generic):
        digest.update(repr(value).encode())


class _Hash(torch.utils.data.Dataset[Any]):
    """One item, the hash or the error why there is none, to be asked for from a worker."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __getitem__(self, index: int) -> Any:
        try:
            return _hash_of_samples(self._dataset)
        except HarnessError as error:
            return error


def _in_worker(dataset: Dataset) -> str:
    # A generator of its own, for else the iterator draws from the global one.
    loader = DataLoader(
        _Hash(dataset), batch_size=None, sampler=[0], num_workers=1, generator=torch.Generator()
    )
    try:
        (result,) = loader
    except RuntimeError as error:
        raise worker_failure(error) from error
    if isinstance(result, HarnessError):
        raise result
    return str(result)
