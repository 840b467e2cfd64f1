"""Two ranks, of which one hangs: it is named, the stacks of both are kept, and both end for a restart."""

from __future__ import annotations

import platform
from pathlib import Path

import orjson
import pytest

from harness.errors import LostRankError
from harness.runlog.incident_files import read_incident, read_rank
from harness.runlog.paths import incident_dir, incidents_dir, summary_file
from harness.runlog.reader import open_run
from tests.support.hanging_anywhere import plan
from tests.support.launch import launch
from tests.support.runs import ROOT, tiny

QUICK = [
    "--watchdog.min_step_s=1.8",
    "--watchdog.min_other_s=60",
    "--guard.lag_steps=0",
    "--parallel.threads=1",
    "--loop.steps=8",
    "--loop.eval_every=5",
    "--checkpoint.every=100",
]


def hang(tmp_path: Path, cause: str) -> tuple[Path, str]:
    """A run that hangs, until its end; its directory and what was said."""
    cause = f"--callbacks=[tests.support.hanging:{cause}]"
    code, output = launch(tiny(tmp_path, *QUICK, cause), PYTHONPATH=str(ROOT))
    assert code == LostRankError.exit_code, output
    return tmp_path / "runs" / "tiny", output


def test_a_rank_that_hangs_is_named_with_the_stacks_of_all(tmp_path: Path) -> None:
    run_dir, output = hang(tmp_path, "hangs")
    (said,) = [text for text in output.splitlines() if "the run hangs" in text]
    assert f"the run hangs: rank 1 ({platform.node()}, pid " in said
    assert "in the backward pass of step 5" in said
    assert "hanging.py" in said
    (folder,) = incidents_dir(run_dir).glob("hang-*")
    stacks = [(folder / f"rank-{rank}.txt").read_text() for rank in range(2)]
    assert "_engine_run_backward" in stacks[0]
    assert "hanging.py" in stacks[1]
    assert "rank 0 (" in (folder / "report.txt").read_text()
    summary = orjson.loads(summary_file(run_dir).read_bytes())
    assert (summary["status"], summary["rank"]) == ("crashed", 1)
    kept = incident_dir(run_dir, 5)
    assert (read_incident(kept).kind, read_incident(kept).rank) == ("hang", 1)
    assert [read_rank(kept, rank).phase for rank in range(2)] == ["in the backward pass"] * 2
    assert read_incident(kept).stacks == folder.name
    end = open_run(run_dir).end
    assert end is not None
    assert (end["state"], end["rank"]) == ("crashed", 1)


def test_a_rank_that_is_stopped_is_named_by_the_others(tmp_path: Path) -> None:
    run_dir, output = hang(tmp_path, "stops")
    (said,) = [text for text in output.splitlines() if "the run hangs" in text]
    assert "the run hangs: rank 1 (" in said
    assert "no sign of life" in said
    (folder,) = incidents_dir(run_dir).glob("hang-*")
    assert sorted(path.name for path in folder.iterdir()) == ["rank-0.txt", "report.txt"]


def test_a_rank_that_waits_for_a_slow_one_raises_no_alarm(tmp_path: Path) -> None:
    slow = "--callbacks=[tests.support.hanging:is_slow]"
    code, output = launch(tiny(tmp_path, *QUICK, slow), PYTHONPATH=str(ROOT))
    assert code == 0, output
    assert not incidents_dir(tmp_path / "runs" / "tiny").exists()


@pytest.mark.parametrize(
    ("place", "settings", "doing"),
    [
        ("backward", ["--parallel.timeout_s=4"], "in the backward pass of step 1"),
        ("disk", ["--watchdog.min_other_s=2"], "saving a checkpoint of step 3"),
    ],
)
def test_a_rank_that_hangs_is_named_wherever_it_does(
    place: str, settings: list[str], doing: str, tmp_path: Path
) -> None:
    plan(tmp_path, place=place, way="hang", rank=1, count=1, seconds=0.0)
    more = ["--checkpoint.every=2", "--callbacks=[tests.support.hanging_anywhere:hangs_as_planned]"]
    code, output = launch(tiny(tmp_path, *QUICK, *more, *settings), PYTHONPATH=str(ROOT))
    assert code == LostRankError.exit_code, output
    (said,) = [text for text in output.splitlines() if "the run hangs" in text]
    assert "the run hangs: rank 1 (" in said
    assert "rank 0 (" not in said
    assert f"has been {doing} for" in said
    assert "hanging_anywhere.py" in said
