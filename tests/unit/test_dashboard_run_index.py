"""The dashboard's table and what it opens: every run found, none read twice, long ones sampled at first."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from harness.dashboard import indexer as indexers
from harness.dashboard import run_index as run_indexes
from harness.dashboard.indexer import Indexer
from harness.dashboard.run_index import RunIndex
from harness.errors import TrackingError
from harness.runlog.digest import Digest
from harness.runlog.paths import log_dir
from harness.runlog.preview import LONG_BYTES
from harness.tracking import RunLog
from harness.tracking.overview import RunRow
from tests.support.runs import wait_for
from tests.support.side_process import let_it_take_its_share

WIDE = {f"metric/{number:03}": 1.0 / 3 for number in range(300)}


@pytest.fixture
def run_index(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RunIndex]:
    if "gives_way" not in request.node.name:
        let_it_take_its_share(monkeypatch, run_indexes)
    one = RunIndex(tmp_path / "runs")
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


def row(run_index: RunIndex, run: str) -> dict[str, Any] | None:
    return next((one for one in run_index.rows() if one["id"] == run), None)


def wait_for_row(run_index: RunIndex, run: str, condition: Callable[[dict[str, Any]], bool]) -> None:
    def holds() -> bool:
        one = row(run_index, run)
        return one is not None and condition(one)

    wait_for(holds, timeout_s=60, what=f"the row of {run}")


@pytest.mark.slow
def test_the_table_follows_the_runs(run_index: RunIndex) -> None:
    root = run_index.root
    write_run(root / "group" / "done", loss=2.0)
    live = write_run(root / "live", state=None)
    (root / "torn" / "log").mkdir(parents=True)
    (root / "torn" / "log" / "00000000.jsonl").write_bytes(b'{"kind":"st')
    wait_for_row(run_index, "group/done", lambda one: one["state"] == "finished" and one["loss"] == 2.0)
    wait_for_row(run_index, "live", lambda one: one["state"] == "running" and one["last_step"] == 4)
    wait_for_row(run_index, "torn", lambda one: one["last_step"] is None)
    live.write("step", {"train/loss": 0.5}, step=5)
    live.write("event", {"name": "incident"}, step=5)
    wait_for_row(run_index, "live", lambda one: (one["loss"], one["num_incidents"]) == (0.5, 1))
    live.close("stopped")
    wait_for_row(run_index, "live", lambda one: one["state"] == "stopped")
    write_run(root / "group" / "done", num_steps=7)
    os.rename(root / "live", root.parent / "elsewhere")
    wait_for_row(run_index, "group/done", lambda one: one["attempts"] == 2 and one["last_step"] == 6)
    wait_for(lambda: row(run_index, "live") is None, timeout_s=30, what="the row's end")
    assert all("path" not in one for one in run_index.rows())


def test_a_run_is_found_at_once_when_somebody_asks(run_index: RunIndex) -> None:
    for number in range(3):
        write_run(run_index.root / f"run {number}")
        wait_for(lambda number=number: f"run {number}" in run_index.names(), what="the run")
    with run_index.reading("run 2") as digest:
        assert digest.last_step == 4
    for stranger in ("../runs/run 1", "run 1/log", "", "x"):
        with pytest.raises(TrackingError, match="there is no run"):
            run_index.directory(stranger)


def num_bytes_read() -> int:
    """By this process, so far."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["rchar"])


@pytest.mark.slow
def test_a_long_run_is_sampled_at_first_then_read_and_never_read_again(run_index: RunIndex) -> None:
    write_long_run(run_index.root / "long")
    size = sum(file.stat().st_size for file in (run_index.root / "long" / "log").glob("*.jsonl"))
    before = num_bytes_read()
    with run_index.reading("long") as digest:
        assert digest.is_preview
        assert digest.last("train/loss") == 1.0
        assert len(digest.bands("train/loss").steps) > 100
    assert (
        num_bytes_read() - before < 0.6 * size
    )  # of a log this short; of a longer one it is the same amount

    def is_read() -> bool:
        with run_index.reading("long") as digest:
            return not digest.is_preview

    wait_for(is_read, timeout_s=120, what="the reading of a long log")
    with run_index.reading("long") as digest:
        assert digest.bands("train/loss", max_points=20).high.max() == 1e6
    wait_for_row(run_index, "long", lambda one: one["read_frac"] == 1 and one["state"] == "finished")

    again = RunIndex(run_index.root)  # which reads nothing by itself: it was not started
    with again.reading("long") as digest:
        assert not digest.is_preview
        assert digest.bands("train/loss", max_points=20).high.max() == 1e6


def test_a_first_look_at_many_runs_reads_little_of_each_however_long_it_is(tmp_path: Path) -> None:
    """So that 300 runs are in the table within seconds: what is read is counted, not the clock."""
    (tmp_path / "cache").mkdir()
    num_read = []
    for num_steps in (1000, 4000):
        root = tmp_path / str(num_steps)
        for number in range(4):
            write_run(root / str(number), num_steps=num_steps)
        answers: list[dict[str, Any]] = []
        indexer = Indexer(root, tmp_path / "cache", answers.append)
        before = num_bytes_read()
        indexer.refresh()
        num_read.append((num_bytes_read() - before) / 4)
        assert [answer["row"]["last_step"] for answer in answers if "row" in answer] == [num_steps - 1] * 4
    assert max(num_read) < 4 * indexers.PREVIEW_BYTES, num_read


def test_rows_of_runs_that_have_ended_are_kept(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "big", num_steps=500)
    answers: list[dict[str, Any]] = []
    cache = tmp_path / "cache"
    cache.mkdir()
    first = Indexer(tmp_path / "runs", cache, answers.append)
    first.refresh()
    assert answers[-1]["row"]["read_frac"] < 1  # of both ends of the log
    assert answers[-1]["row"]["last_step"] == 499
    while first.has_unread:
        first.read_on(10.0)
    complete = answers[-1]["row"]
    assert complete["read_frac"] == 1

    answers.clear()
    second = Indexer(tmp_path / "runs", cache, answers.append)
    second.refresh()
    assert [answer.get("row") for answer in answers] == [None, {**complete, "tags": []}]
    assert not second.has_unread
    write_run(tmp_path / "runs" / "big", num_steps=600)
    third = Indexer(tmp_path / "runs", cache, answers.append)
    third.refresh()
    assert answers[-1]["row"]["last_step"] == 599
    assert third.has_unread


def test_a_run_of_which_nothing_can_be_made_is_read_again_only_when_its_log_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def fails(digest: Digest) -> RunRow:
        tries.append(digest.path)
        raise ValueError("nothing can be made of it")

    monkeypatch.setattr(indexers, "run_row", fails)
    monkeypatch.setattr(indexers, "SEARCH_EVERY_S", 0.0)
    answers: list[dict[str, Any]] = []
    indexer = Indexer(tmp_path / "runs", tmp_path / "cache", answers.append)
    for num_tries in (1, 2):
        write_run(tmp_path / "runs" / "odd")
        for _ in range(3):
            indexer.refresh()
        assert len(tries) == num_tries


def test_a_folder_that_cannot_be_written_to_is_shown_all_the_same(tmp_path: Path) -> None:
    write_run(tmp_path / "one")
    (tmp_path / ".dashboard").write_text("not a folder")
    run_index = RunIndex(tmp_path)
    run_index.start()
    try:
        wait_for_row(run_index, "one", lambda one: one["state"] == "finished")
    finally:
        run_index.close()
    assert (tmp_path / ".dashboard").read_text() == "not a folder"


def test_an_indexer_that_dies_is_restarted(run_index: RunIndex) -> None:
    indexer = run_index._indexer
    assert isinstance(indexer, subprocess.Popen)
    indexer.send_signal(signal.SIGKILL)
    indexer.wait()
    write_run(run_index.root / "one")
    wait_for_row(run_index, "one", lambda one: one["state"] == "finished")


def test_the_indexer_gives_way_to_others(run_index: RunIndex) -> None:
    indexer = run_index._indexer
    assert isinstance(indexer, subprocess.Popen)
    priority = partial(os.getpriority, os.PRIO_PROCESS, indexer.pid)
    wait_for(lambda: priority() == 19, timeout_s=60, what="the lowest priority")


def test_the_indexer_ends_with_the_dashboard(run_index: RunIndex) -> None:
    indexer = run_index._indexer
    assert isinstance(indexer, subprocess.Popen)
    write_run(run_index.root / "one")
    wait_for_row(run_index, "one", lambda one: True)
    run_index.close()
    assert indexer.returncode == 0


def test_an_answer_that_is_torn_by_a_kill_is_passed_over(tmp_path: Path) -> None:
    script = 'import sys; sys.stdout.write(\'{"runs": ["a"]}\\n{"run": "a", "ro\')'
    run_index = RunIndex(tmp_path)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as reader:
        run_index._receive(reader)
    assert run_index.num_unread() == 1


def test_a_loss_that_is_not_finite_is_spelled_out_in_the_table_and_kept(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "a", loss=math.nan)
    (tmp_path / "cache").mkdir()
    for _ in range(2):  # the second time from the cache
        answers: list[dict[str, Any]] = []
        indexer = Indexer(tmp_path / "runs", tmp_path / "cache", answers.append)
        indexer.refresh()
        indexer.read_on(1.0)
        assert [answer["row"]["loss"] for answer in answers if "row" in answer] == ["nan"]
    assert indexer._rows.keys() == {"a"}
