"""The order of samples: a permutation that is computed, never stored.

Position `p` of epoch `e` is the same sample at every world size and micro-batch size, and the order can be
entered anywhere without walking up to it, so a loader's whole state is one number.

The permutation of `[0, n)` is a generalized Feistel network on `rows x columns >= n` cells with cycle
walking (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002): write the position as
(row, column), add to each in turn a keyed hash of the other, and go round again for the few results that
are not below `n`. Each addition can be undone, so the whole is a bijection whatever the hash is. The hash
is the finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["mix", "sample_order", "substituted"]

_ROUNDS = 8  # 6 leave small permutations measurably uneven
_GOLDEN = 0x9E3779B97F4A7C15

UInts = NDArray[np.uint64]


def sample_order(
    num_samples: int, seed: int, epoch: int | NDArray[np.int64], positions: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Which sample stands at each of `positions` of an epoch.

    Args:
        num_samples: Samples in the data set, at least 1.
        seed: Whole number >= 0.
        epoch: One epoch, or one per position.
        positions: Positions within the epoch, each in `[0, num_samples)`.

    Returns:
        Sample indices of the shape of `positions`.
    """
    rows = math.isqrt(num_samples - 1) + 1
    columns = -(-num_samples // rows)
    order = np.asarray(positions, dtype=np.uint64).copy()
    key = np.broadcast_to(mix(seed, epoch), order.shape)
    walking = np.ones(order.shape, dtype=bool)
    while walking.any():
        order[walking] = _permute(order[walking], key[walking], rows, columns)
        walking = order >= num_samples
    return order.astype(np.int64)


def substituted(
    indices: NDArray[np.int64],
    quarantined: NDArray[np.int64],
    *,
    num_samples: int,
    seed: int,
    positions: NDArray[np.int64],
) -> NDArray[np.int64]:
    """The same samples, each quarantined one replaced by another that is drawn by its position.

    The other positions keep their samples, so that the list may change in the middle of an epoch.

    Args:
        indices: What `sample_order` gave.
        quarantined: Sample indices, sorted, each once; fewer than `num_samples`.
        positions: Global positions, over all epochs.
    """
    places = np.minimum(np.searchsorted(quarantined, indices), max(len(quarantined) - 1, 0))
    bad = quarantined[places] == indices if len(quarantined) else np.zeros(indices.shape, dtype=bool)
    if not bad.any():
        return indices
    draws = _finalize(mix(seed, np.asarray(positions)[bad])) % np.uint64(num_samples - len(quarantined))
    # The k-th sample that is not quarantined: k, and one for each quarantined sample before it.
    k = draws.astype(np.int64)
    replaced = indices.copy()
    replaced[bad] = k + np.searchsorted(quarantined - np.arange(len(quarantined)), k, side="right")
    return replaced


def mix(seed: int, number: int | NDArray[np.int64]) -> UInts:
    """A 64-bit hash of `seed` and each `number` as a one-dimensional array; the same on every machine."""
    # Arrays wrap around silently, as hashing wants it; numpy scalars would warn.
    start = np.array([seed % 2**64], dtype=np.uint64)
    return _finalize(_finalize(start) + np.atleast_1d(number).astype(np.uint64))


def _permute(cells: UInts, key: UInts, rows: int, columns: int) -> UInts:
    """One pass of the network over `[0, rows * columns)`."""
    row, column = np.divmod(cells, np.uint64(columns))
    for _ in range(_ROUNDS):
        key = _finalize(key)
        row = (row + _finalize(key ^ column) % np.uint64(rows)) % np.uint64(rows)
        key = _finalize(key)
        column = (column + _finalize(key ^ row) % np.uint64(columns)) % np.uint64(columns)
    return row * np.uint64(columns) + column


def _finalize(x: UInts) -> UInts:
    """One step of SplitMix64."""
    x = x + np.uint64(_GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
