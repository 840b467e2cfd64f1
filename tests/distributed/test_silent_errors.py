"""Errors of two ranks that make no noise: named when the loop is broken, and not when it is mended."""

from __future__ import annotations

from tests.support.distributed import run_ranks
from tests.support.silent_errors_of_ranks import TOGETHER, all_of_them


def test_a_broken_loop_of_two_ranks_is_named_on_both_and_a_mended_one_is_not() -> None:
    one, other = run_ranks(all_of_them, 2, timeout_s=240)
    assert one == other
    for loop, check in TOGETHER.items():
        broken, mended = one[loop.__name__]
        assert check in broken, (loop.__name__, broken)
        assert mended == [], (loop.__name__, mended)
