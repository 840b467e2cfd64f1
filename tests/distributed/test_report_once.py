"""Ranks that fail together: one of them says it, and none leaves before."""

from __future__ import annotations

import time

import pytest

from harness.dist import report_once
from harness.errors import DataError, HarnessError, LostRankError
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


def judged(rank: int, size: int, kind: type[HarnessError]) -> bool:
    """Whether this rank's error says that a restart may help."""
    try:
        with report_once():
            if rank == 1:
                raise kind("odd")
            time.sleep(0.2)
            raise RuntimeError("the connection is lost")
    except HarnessError as error:
        return error.restart_may_help


@pytest.mark.parametrize(("kind", "may_help"), [(DataError, False), (LostRankError, True)])
def test_all_ranks_judge_alike_whether_a_restart_may_help(kind: type[HarnessError], may_help: bool) -> None:
    assert run_ranks(judged, 2, kind) == [may_help, may_help]
