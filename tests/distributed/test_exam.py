"""A few of another package's faults: each is seen, and its rank named. All of them: scripts/exam.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.support.distributed import run_ranks
from tests.support.exam import CLEAN, Cell, judge, train_cells

CELLS = [
    Cell("tensor_corruption", "output", "single_bitflip", "near_invisible"),
    Cell("tensor_corruption", "weight", "single_bitflip", "subtle"),
    Cell("stale_state", "gradient"),
]


@pytest.mark.skipif(
    importlib.util.find_spec("lm_resiliency") is None,
    reason="lm-resiliency is not installed: pip install -e '.[exam]'",
)
@pytest.mark.parametrize("num_cells", [1, pytest.param(len(CELLS), marks=pytest.mark.slow)])
def test_faults_of_another_kit_are_detected_with_their_rank(num_cells: int, tmp_path: Path) -> None:
    cells = [CLEAN, *CELLS[:num_cells]]
    found = list(zip(*run_ranks(train_cells, 3, str(tmp_path), cells), strict=True))
    outcomes = [judge(str(tmp_path), number, found[number], found[0]) for number in range(len(cells))]
    assert not outcomes[0].is_detected
    seen = [(one.was_injected, one.is_detected, one.is_right_rank) for one in outcomes[1:]]
    assert seen == [(True, True, True)] * num_cells
