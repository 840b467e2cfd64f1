"""Logs that somebody cut short, removed, wrote into, or that came in very many files."""

from __future__ import annotations

import os
import shutil
import tracemalloc
from pathlib import Path

import pytest

from harness.errors import TrackingError
from harness.runlog import segments as segment_files
from harness.runlog.codec import encode
from harness.runlog.nodes import NodeLog
from harness.runlog.paths import log_dir
from harness.runlog.preview import open_whole, preview
from harness.runlog.segments import Follower, segments
from harness.runlog.writer import RunLog


def fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("of_node", [False, True])
def test_a_log_that_was_cut_short_is_read_anew(of_node: bool, tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        for step in range(1000):
            log.write("step", {"train/loss": float(step)}, step=step)
    node = NodeLog(tmp_path)
    for number in range(100):
        node.write("system", {"system/cpu_frac": number / 100})
    digest = open_whole(tmp_path)
    folder = next((log_dir(tmp_path) / "nodes").iterdir()) if of_node else log_dir(tmp_path)
    [path] = segments(folder)
    os.truncate(path, path.stat().st_size // 2)
    digest.refresh()
    fresh = open_whole(tmp_path)
    assert digest.last_step == fresh.last_step
    for name in ("train/loss", "system/cpu_frac"):
        assert digest.bands(name).high.tolist() == fresh.bands(name).high.tolist()
    assert fresh.last_step == 999 if of_node else fresh.last_step is not None and fresh.last_step < 999


def test_a_folder_of_many_segments_is_listed_a_few_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunLog(tmp_path, segment_bytes=1) as log:
        for step in range(100):
            log.write("step", {"x": 1.0}, step=step)
    listings = 0
    list_folder = segment_files.list_folder

    def counted(folder: Path, *, within: Path | None = None) -> object:
        nonlocal listings
        listings += 1
        return list_folder(folder, within=within)

    monkeypatch.setattr(segment_files, "list_folder", counted)
    assert open_whole(tmp_path).last_step == 99
    assert listings < 10


def test_a_follower_of_many_segments_sees_those_that_are_added_and_passes_over_those_removed(
    tmp_path: Path,
) -> None:
    with RunLog(tmp_path, segment_bytes=1) as log:
        log.write("step", {"x": 1.0}, step=0)
        follower = Follower(log_dir(tmp_path))
        seen = follower.read()
        for step in range(1, 9):
            log.write("step", {"x": 1.0}, step=step)
        while records := follower.read():
            seen += records
            if records[0].step == 4:
                segments(log_dir(tmp_path))[6].unlink()  # that of step 5
                with pytest.raises(FileNotFoundError):
                    follower.read()
    while records := follower.read():
        seen += records
    assert [record.step for record in seen if record.kind == "step"] == [0, 1, 2, 3, 4, 6, 7, 8]


def test_a_run_whose_directory_was_removed_is_closed_and_may_begin_again(tmp_path: Path) -> None:
    before = fds()
    log = RunLog(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    log.close()
    assert fds() == before
    with RunLog(tmp_path / "run") as log:
        log.write("step", {"x": 1.0}, step=0)
    assert open_whole(tmp_path / "run").last_step == 0


@pytest.mark.parametrize("attempt", [2**31 - 1, 2**31 - 2])
def test_no_attempt_begins_that_readers_would_not_take(attempt: int, tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.write("step", {"x": 1.0}, step=0)
    with segments(log_dir(tmp_path))[-1].open("ab") as file:
        file.write(encode("step", {"x": 1.0}, attempt=attempt, step=1, time=1.0))
    before = fds()
    with pytest.raises(TrackingError, match=f"{attempt}.*Remove the line") as error:
        RunLog(tmp_path)
    del error
    assert fds() == before


@pytest.mark.parametrize("num_segments", [1, 4])
def test_a_preview_keeps_a_bounded_number_of_bytes_however_long_the_lines_are(
    num_segments: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.runlog.preview.MOST_BYTES", 1 << 20)
    with RunLog(tmp_path, segment_bytes=(16 << 20) // num_segments) as log:
        for step in range(64):
            log.write("text", {"said": "x" * (250_000 if step != 40 else 4 << 20)}, step=step)
            log.write("step", {"x": float(step)}, step=step)
    tracemalloc.start()
    digest = preview(tmp_path, tail_bytes=1000)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 6 << 20
    assert (digest.last_step, digest.state()) == (63, "finished")
