"""Turns sample indices into a `Batch`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset, default_collate, default_convert

from harness.data.seeding import own_generators, seed_host
from harness.data.task import Batch, Dataset
from harness.errors import DataError
from harness.user_code import user_code

__all__ = ["fetch", "map_tensors", "to_device", "worker_failure"]

_SAMPLES = (
    "samples are dicts of tensors, arrays, numbers or strings by name, such as {'inputs': x, 'targets': y}"
)


def fetch(dataset: Dataset, indices: Sequence[int], seeds: Sequence[int] | None = None) -> Batch:
    """Samples `indices`, at least one, as one batch.

    A dataset with `__getitems__` is asked once, after torch's, numpy's and Python's generators have been
    seeded with the first of `seeds` (default: the indices). One without is asked sample by sample, after they
    have been seeded with the sample's own. Afterwards they are as they were. So random augmentation depends
    on the sample's place in the run and on nothing else.

    Raises:
        TaskError: the dataset raised something.
        DataError: what it gave cannot be made a batch.
    """
    seeds = seeds or indices
    with own_generators():
        if not _fetches_at_once(dataset):
            return _collate(dataset, [_sample(dataset, *pair) for pair in zip(indices, seeds, strict=True)])
        seed_host(seeds[0])
        shown = f"[{', '.join(map(str, indices[:3]))}{', ...' if len(indices) > 3 else ''}]"
        with user_code(f"{type(dataset).__name__}.__getitems__({shown})", rule=_SAMPLES):
            samples = dataset.__getitems__(list(indices))  # type: ignore[attr-defined]  # has just been seen
    if isinstance(samples, dict):
        batch: Batch = default_convert(samples)
        return batch
    return _collate(dataset, samples)


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor in it, at whatever depth of dicts, lists and tuples, replaced."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(item, function) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, function) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(item, function) for item in value)
    return value


def to_device(batch: Batch, device: torch.device) -> Batch:
    """A new batch, its tensors on `device`; the copies run beside the host if the batch is pinned."""
    moved: Batch = map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))
    return moved


def worker_failure(error: RuntimeError) -> DataError:
    """What to say when `torch.utils.data.DataLoader` raised `error` because a worker died."""
    return DataError(
        f"a loader worker failed: {str(error).strip().splitlines()[-1]}",
        rule="a worker lives as long as the run; the system kills one for want of memory",
        remedy="lower --data.num_workers, or set it to 0 to load in the training process",
    )


def _fetches_at_once(dataset: Any) -> bool:
    # torch's Subset has a `__getitems__` whether or not the data set within has one of its own.
    while getattr(type(dataset), "__getitems__", None) is Subset.__getitems__:
        dataset = dataset.dataset
    return hasattr(dataset, "__getitems__")


def _sample(dataset: Dataset, index: int, seed: int) -> Any:
    seed_host(seed)
    with user_code(f"{type(dataset).__name__}[{index}]", rule=_SAMPLES):
        return dataset[index]


def _collate(dataset: Dataset, samples: Any) -> Batch:
    name = type(dataset).__name__
    if not isinstance(samples, list) or not samples:
        raise DataError(
            f"{name}.__getitems__ returned a {type(samples).__name__}",
            rule="it returns a list of samples or a batch, which is a dict of tensors",
        )
    for sample in samples:
        if not isinstance(sample, dict):
            raise DataError(
                f"a sample of {name} is a {type(sample).__name__}",
                rule=_SAMPLES,
                remedy="return a dict from __getitem__",
            )
    try:
        batch: Batch = default_collate(samples)
    except (TypeError, RuntimeError, ValueError, KeyError) as error:
        raise DataError(
            f"{len(samples)} samples of {name} do not make a batch: {str(error).strip().splitlines()[0]}",
            rule=f"{_SAMPLES}; all have the same names, shapes and dtypes",
            remedy="pad them in __getitem__, or return a finished batch from __getitems__",
        ) from error
    return batch
