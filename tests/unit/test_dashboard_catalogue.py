"""The dashboard's table and what it opens: every run found, none read twice, long ones sampled at first."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.dashboard import surveyor as surveyors
from harness.dashboard.catalogue import Catalogue
from harness.dashboard.surveyor import Surveyor
from harness.errors import TrackingError
from harness.tracking import RunLog
from harness.tracking.digest import Digest
from harness.tracking.log import log_dir
from harness.tracking.overview import Glance
from harness.tracking.sample import LONG_BYTES
from tests.support.runs import wait_for

WIDE = {f"metric/{number:03}": 1.0 / 3 for number in range(300)}


@pytest.fixture
def catalogue(tmp_path: Path) -> Iterator[Catalogue]:
    one = Catalogue(tmp_path / "runs")
    one.start()
    yield one
    one.close()


def write_run(
    run_dir: Path, *, num_steps: int = 5, state: str | None = "finished", loss: float = 1.0
) -> RunLog:
    log = RunLog(run_dir)
    for step in range(num_steps):
        log.write("step", {"train/loss": loss}, step=step)
    if state is not None:
        log.close(state)
    return log


def write_long_run(run_dir: Path) -> None:
    """Of more bytes than are read while somebody waits; with one spike."""
    with RunLog(run_dir) as log:
        step = 0
        while sum(file.stat().st_size for file in log_dir(run_dir).glob("*.jsonl")) < 1.2 * LONG_BYTES:
            for _ in range(500):
                log.write("step", {**WIDE, "train/loss": 1e6 if step == 1777 else 1.0}, step=step)
                step += 1


def row(catalogue: Catalogue, run: str) -> dict[str, Any] | None:
    return next((one for one in catalogue.rows() if one["id"] == run), None)


def wait_for_row(catalogue: Catalogue, run: str, condition: Callable[[dict[str, Any]], bool]) -> None:
    def holds() -> bool:
        one = row(catalogue, run)
        return one is not None and condition(one)

    wait_for(holds, timeout_s=60, what=f"the row of {run}")


@pytest.mark.slow
def test_the_table_follows_the_runs(catalogue: Catalogue) -> None:
    root = catalogue.root
    write_run(root / "group" / "done", loss=2.0)
    live = write_run(root / "live", state=None)
    (root / "torn" / "log").mkdir(parents=True)
    (root / "torn" / "log" / "00000000.jsonl").write_bytes(b'{"kind":"st')
    wait_for_row(catalogue, "group/done", lambda one: one["state"] == "finished" and one["loss"] == 2.0)
    wait_for_row(catalogue, "live", lambda one: one["state"] == "running" and one["last_step"] == 4)
    wait_for_row(catalogue, "torn", lambda one: one["last_step"] is None)
    live.write("step", {"train/loss": 0.5}, step=5)
    live.write("event", {"name": "incident"}, step=5)
    wait_for_row(catalogue, "live", lambda one: (one["loss"], one["num_incidents"]) == (0.5, 1))
    live.close("stopped")
    wait_for_row(catalogue, "live", lambda one: one["state"] == "stopped")
    write_run(root / "group" / "done", num_steps=7)
    os.rename(root / "live", root.parent / "elsewhere")
    wait_for_row(catalogue, "group/done", lambda one: one["attempts"] == 2 and one["last_step"] == 6)
    wait_for(lambda: row(catalogue, "live") is None, timeout_s=30, what="the row's end")
    assert all("path" not in one for one in catalogue.rows())


def test_a_run_is_found_at_once_when_somebody_asks(catalogue: Catalogue) -> None:
    for number in range(3):
        write_run(catalogue.root / f"run {number}")
        wait_for(lambda number=number: f"run {number}" in catalogue.names(), what="the run")
    with catalogue.reading("run 2") as digest:
        assert digest.last_step == 4
    for stranger in ("../runs/run 1", "run 1/log", "", "x"):
        with pytest.raises(TrackingError, match="there is no run"):
            catalogue.directory(stranger)


def num_bytes_read() -> int:
    """By this process, so far."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["rchar"])


@pytest.mark.slow
def test_a_long_run_is_sampled_at_first_then_read_and_never_read_again(catalogue: Catalogue) -> None:
    write_long_run(catalogue.root / "long")
    size = sum(file.stat().st_size for file in (catalogue.root / "long" / "log").glob("*.jsonl"))
    before = num_bytes_read()
    with catalogue.reading("long") as digest:
        assert digest.is_sample
        assert digest.last("train/loss") == 1.0
        assert len(digest.bands("train/loss").steps) > 100
    assert (
        num_bytes_read() - before < 0.6 * size
    )  # of a log this short; of a longer one it is the same amount

    def is_read() -> bool:
        with catalogue.reading("long") as digest:
            return not digest.is_sample

    wait_for(is_read, timeout_s=120, what="the reading of a long log")
    with catalogue.reading("long") as digest:
        assert digest.bands("train/loss", max_points=20).high.max() == 1e6
    wait_for_row(catalogue, "long", lambda one: one["read_frac"] == 1 and one["state"] == "finished")

    again = Catalogue(catalogue.root)  # which reads nothing by itself: it was not started
    with again.reading("long") as digest:
        assert not digest.is_sample
        assert digest.bands("train/loss", max_points=20).high.max() == 1e6


def test_rows_of_runs_that_have_ended_are_kept(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "big", num_steps=500)
    told: list[dict[str, Any]] = []
    kept = tmp_path / "kept"
    kept.mkdir()
    first = Surveyor(tmp_path / "runs", kept, told.append)
    first.look()
    assert told[-1]["glance"]["read_frac"] < 1  # a peek
    assert told[-1]["glance"]["last_step"] == 499
    while first.has_unread:
        first.read_on(10.0)
    complete = told[-1]["glance"]
    assert complete["read_frac"] == 1

    told.clear()
    second = Surveyor(tmp_path / "runs", kept, told.append)
    second.look()
    assert [answer.get("glance") for answer in told] == [None, {**complete, "tags": []}]
    assert not second.has_unread
    write_run(tmp_path / "runs" / "big", num_steps=600)
    third = Surveyor(tmp_path / "runs", kept, told.append)
    third.look()
    assert told[-1]["glance"]["last_step"] == 599
    assert third.has_unread


def test_a_run_of_which_nothing_can_be_made_is_read_again_only_when_its_log_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def fails(digest: Digest) -> Glance:
        tries.append(digest.path)
        raise ValueError("nothing can be made of it")

    monkeypatch.setattr(surveyors, "glance", fails)
    monkeypatch.setattr(surveyors, "SEARCH_EVERY_S", 0.0)
    told: list[dict[str, Any]] = []
    surveyor = Surveyor(tmp_path / "runs", tmp_path / "kept", told.append)
    for num_tries in (1, 2):
        write_run(tmp_path / "runs" / "odd")
        for _ in range(3):
            surveyor.look()
        assert len(tries) == num_tries


def test_a_folder_that_cannot_be_written_to_is_shown_all_the_same(tmp_path: Path) -> None:
    write_run(tmp_path / "one")
    (tmp_path / ".dashboard").write_text("not a folder")
    catalogue = Catalogue(tmp_path)
    catalogue.start()
    try:
        wait_for_row(catalogue, "one", lambda one: one["state"] == "finished")
    finally:
        catalogue.close()
    assert (tmp_path / ".dashboard").read_text() == "not a folder"


def test_a_reader_that_dies_is_started_again(catalogue: Catalogue) -> None:
    surveyor = catalogue._surveyor
    assert isinstance(surveyor, subprocess.Popen)
    surveyor.send_signal(signal.SIGKILL)
    surveyor.wait()
    write_run(catalogue.root / "one")
    wait_for_row(catalogue, "one", lambda one: one["state"] == "finished")


def test_the_reader_ends_with_the_dashboard_and_gives_way_to_others(catalogue: Catalogue) -> None:
    surveyor = catalogue._surveyor
    assert isinstance(surveyor, subprocess.Popen)
    write_run(catalogue.root / "one")
    wait_for_row(catalogue, "one", lambda one: True)
    assert os.getpriority(os.PRIO_PROCESS, surveyor.pid) == 19
    catalogue.close()
    assert surveyor.returncode == 0


def test_an_answer_that_is_torn_by_a_kill_is_passed_over(tmp_path: Path) -> None:
    script = 'import sys; sys.stdout.write(\'{"runs": ["a"]}\\n{"run": "a", "gla\')'
    catalogue = Catalogue(tmp_path)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as reader:
        catalogue._hear(reader)
    assert catalogue.num_unread() == 1
