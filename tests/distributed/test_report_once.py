"""Ranks that fail together: one of them says it, and none leaves before."""

from __future__ import annotations

import time

import pytest

from harness.dist import report_once
from harness.errors import DataError, HarnessError
from tests.support.distributed import run_ranks


def leaving(rank: int, size: int, failing: list[int], ranks: tuple[int, ...] | None) -> tuple[float, float]:
    """When this rank had said it, 0 if it did not, and when it left."""
    said = 0.0

    def report(error: HarnessError) -> None:
        nonlocal said
        time.sleep(0.7)  # the terminal may be slow
        said = time.time()

    try:
        with report_once(report):
            if rank in failing:
                error = DataError("odd")
                error.ranks = ranks
                raise error
            time.sleep(0.2)
            raise RuntimeError("the connection is lost")
    except HarnessError:
        return said, time.time()


@pytest.mark.parametrize(
    ("failing", "ranks"), [([0, 1], None), ([0, 1], ()), ([0, 1], (1,)), ([0], None), ([1], None)]
)
def test_no_rank_leaves_before_one_of_them_has_said_what_is_wrong(
    failing: list[int], ranks: tuple[int, ...] | None
) -> None:
    outcomes = run_ranks(leaving, 2, failing, ranks)
    (said,) = [said for said, _ in outcomes if said]
    assert all(left >= said for _, left in outcomes)
    reporter = min(ranks or failing)
    assert outcomes[reporter][0] == said
