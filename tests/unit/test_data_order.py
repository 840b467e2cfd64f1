"""The computed permutation: a bijection, different per seed and epoch, and evenly mixed."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from harness.data.order import mix, sample_order


def whole_epoch(num_samples: int, *, seed: int = 0, epoch: int = 0) -> list[int]:
    return sample_order(num_samples, seed, epoch, np.arange(num_samples)).tolist()


@pytest.mark.parametrize("num_samples", [1, 2, 3, 5, 7, 16, 97, 1000, 65_537])
def test_each_sample_comes_exactly_once_in_an_epoch(num_samples: int) -> None:
    assert sorted(whole_epoch(num_samples, seed=3, epoch=2)) == list(range(num_samples))


def test_the_order_does_not_depend_on_how_positions_are_asked_for() -> None:
    whole = whole_epoch(1001, seed=5, epoch=1)
    in_parts = [sample_order(1001, 5, 1, np.array([p]))[0] for p in (1000, 0, 17)]
    assert in_parts == [whole[1000], whole[0], whole[17]]


def test_a_batch_across_the_end_of_an_epoch_takes_each_position_from_its_own_epoch() -> None:
    across = sample_order(10, 5, np.array([0, 1]), np.array([9, 0])).tolist()
    assert across == [whole_epoch(10, seed=5, epoch=0)[9], whole_epoch(10, seed=5, epoch=1)[0]]


def test_seeds_and_epochs_give_unrelated_orders() -> None:
    base = np.array(whole_epoch(10_000))
    for other in (whole_epoch(10_000, seed=1), whole_epoch(10_000, epoch=1)):
        # Two random orders agree in about one place whatever their length.
        assert (base == np.array(other)).sum() < 10


@pytest.mark.parametrize("num_samples", [4, 5])
def test_all_orders_of_a_small_set_are_about_equally_frequent(num_samples: int) -> None:
    expected, num_orders = 100, math.factorial(num_samples)
    epochs = np.repeat(np.arange(expected * num_orders), num_samples)
    positions = np.tile(np.arange(num_samples), expected * num_orders)
    orders = Counter(map(tuple, sample_order(num_samples, 0, epochs, positions).reshape(-1, num_samples)))
    chi_square = sum((seen - expected) ** 2 / expected for seen in orders.values())
    chi_square += expected * (num_orders - len(orders))
    degrees = num_orders - 1
    assert abs(chi_square - degrees) < 4 * math.sqrt(2 * degrees)


def test_neighbours_in_an_epoch_are_not_neighbours_in_the_data() -> None:
    order = np.array(whole_epoch(100_000, seed=9))
    correlation = np.corrcoef(order[:-1], order[1:])[0, 1]
    assert abs(correlation) < 4 / math.sqrt(len(order))


def test_the_hash_is_the_same_on_every_machine() -> None:
    assert mix(3, 4).tolist() == [3521583462059481702]
