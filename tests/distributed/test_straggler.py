"""Two ranks, of which one is slow or gets its data late: it is named, and no other."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from tests.support.straggling import late_run


@pytest.mark.parametrize(
    ("kind", "strategy", "rank"),
    [("straggler", "ddp", 1), ("straggler", "fsdp", 0), ("data-bound rank", "ddp", 1)],
)
def test_the_rank_that_holds_up_the_other_is_named(
    tmp_path: Path, kind: Literal["straggler", "data-bound rank"], strategy: str, rank: int
) -> None:
    assert late_run(tmp_path, kind, rank=rank, strategy=strategy, late_s=0.05) == [(kind, rank)]
