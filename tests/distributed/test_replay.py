"""A step that two ranks made is replayed in one process: to the same bits, and with its cause."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.config import FaultConfig
from harness.replay import replay
from tests.support.distributed import run_ranks
from tests.support.replayed import check_fault, faults, train_faults

STRUCK = {
    ("ddp", "fp32"): [one for one in faults(["nan"]) if one.rank == 1],
    ("fsdp", "bf16"): [one for one in faults(["inf"]) if one.rank == 0 and one.target != "loss"],
}


@pytest.mark.parametrize(("strategy", "precision"), STRUCK)
def test_a_fault_is_found_again(strategy: str, precision: str, tmp_path: Path) -> None:
    struck = STRUCK[strategy, precision]
    run_ranks(train_faults, 2, str(tmp_path), strategy, precision, struck)
    directory = tmp_path / "runs" / "own"
    files = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}
    assert {one.target: check_fault(directory, one).problems for one in struck} == {
        one.target: [] for one in struck
    }
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()} == files


def test_the_way_to_a_step_is_the_runs_bit_for_bit(tmp_path: Path) -> None:
    """With dropout, which draws other numbers on each rank, and from the beginning of the run."""
    struck = [FaultConfig(step=3, rank=1, target="loss")]
    run_ranks(train_faults, 2, str(tmp_path), "ddp", "fp32", struck)
    found = replay(tmp_path / "runs" / "own", steps_before=3)
    assert found.started_from == 0
    assert (found.parting.num_steps, found.parting.num_same_bits, found.reproduced) == (3, 3, True)
