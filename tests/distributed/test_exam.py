"""A few of another package's faults: each is seen, and its rank named. All of them: scripts/exam.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.support.distributed import run_ranks
from tests.support.exam import CLEAN, Cell, judge, train_cells

CELLS = [
    CLEAN,
    Cell("tensor_corruption", "output", "single_bitflip", "near_invisible"),
    Cell("tensor_corruption", "weight", "single_bitflip", "subtle"),
    Cell("stale_state", "gradient"),
]


@pytest.mark.skipif(
    importlib.util.find_spec("lm_resiliency") is None,
    reason="lm-resiliency is not installed: pip install -e '.[exam]'",
)
def test_faults_of_another_kit_are_detected_with_their_rank(tmp_path: Path) -> None:
    found = list(zip(*run_ranks(train_cells, 3, str(tmp_path), CELLS), strict=True))
    outcomes = [judge(str(tmp_path), number, found[number], found[0]) for number in range(len(CELLS))]
    assert not outcomes[0].is_detected
    assert [(one.was_injected, one.is_detected, one.is_right_rank) for one in outcomes[1:]] == [
        (True, True, True)
    ] * 3
