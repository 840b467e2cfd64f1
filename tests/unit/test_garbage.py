"""Garbage is collected after set steps, and Python's collector is as it was afterwards."""

from __future__ import annotations

import gc
import weakref

import pytest

from harness.training.garbage import GarbageCollection


class Circle:
    """Only the cyclic collector frees it."""

    def __init__(self) -> None:
        self.itself = self


def test_garbage_is_collected_after_set_steps_alone() -> None:
    with GarbageCollection(5) as garbage:
        for step in range(1, 10):
            garbage.after_step(step)
        left = weakref.ref(Circle())
        kept = [[number] for number in range(100_000)]  # Python's own collector would have come by
        assert kept
        before = left()
        garbage.after_step(10)
        assert before is not None
        del before
        garbage.after_step(11)
        garbage.after_step(15)
        assert left() is None


@pytest.mark.parametrize("every", [0, 1])
def test_the_collector_is_left_as_it_was(every: int) -> None:
    frozen_before = gc.get_freeze_count()
    with GarbageCollection(every) as garbage:
        assert gc.isenabled() == (every == 0)
        for step in range(1, 5):
            garbage.after_step(step)
        assert (gc.get_freeze_count() > frozen_before) == (every > 0)
    assert gc.isenabled()
    assert gc.get_freeze_count() == (0 if every else frozen_before)


def test_what_lasts_is_not_looked_through_again() -> None:
    with GarbageCollection(1) as garbage:
        for step in range(1, 4):
            garbage.after_step(step)
        assert len(gc.get_objects()) < gc.get_freeze_count() / 10
