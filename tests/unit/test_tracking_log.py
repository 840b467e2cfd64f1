"""The log: one writer, nothing lost that was written, attempts told apart."""

from __future__ import annotations

import errno
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from harness.errors import TrackingError
from harness.runlog.codec import Record
from harness.runlog.paths import log_dir
from harness.runlog.segments import Follower, segments
from harness.runlog.writer import RunLog


def everything(run_dir: Path) -> list[Record]:
    follower, records = Follower(log_dir(run_dir)), []
    while new := follower.read():
        records += new
    return records


def losses(run_dir: Path) -> list[tuple[int, int | None, float]]:
    return [(r.attempt, r.step, r.values["loss"]) for r in everything(run_dir) if r.kind == "step"]


def test_records_come_back_in_order_with_the_attempts_own_frame(tmp_path: Path) -> None:
    with RunLog(tmp_path, info={"note": "here"}) as log:
        for step in range(3):
            log.write("step", {"loss": float(step)}, step=step)
    records = everything(tmp_path)
    assert [r.kind for r in records] == ["run", "step", "step", "step", "end"]
    assert records[0].values["pid"] == os.getpid()
    assert records[0].values["note"] == "here"
    assert records[-1].values == {"state": "finished"}


def test_each_opening_is_a_new_attempt(tmp_path: Path) -> None:
    for _ in range(3):
        with RunLog(tmp_path) as log:
            log.write("step", {"loss": 1.0}, step=0)
    assert losses(tmp_path) == [(0, 0, 1.0), (1, 0, 1.0), (2, 0, 1.0)]


def test_a_rewind_begins_a_new_attempt_unless_this_one_has_no_steps_yet(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.rewind(10)
    assert log.attempt == 0
    log.write("step", {"loss": 1.0}, step=10)
    log.rewind(5)
    assert log.attempt == 1
    log.close()


def test_a_second_writer_is_refused_in_this_process_and_in_another(tmp_path: Path) -> None:
    with RunLog(tmp_path):
        with pytest.raises(TrackingError, match="being written by process"):
            RunLog(tmp_path)
        program = "import sys; from harness.tracking import RunLog; RunLog(sys.argv[1])"
        other = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False
        )
        assert f"being written by process {os.getpid()}" in other.stderr
    RunLog(tmp_path).close()


def test_the_lock_goes_with_a_killed_writer_although_a_forked_child_lives_on(tmp_path: Path) -> None:
    program = (
        "import os, sys, time\n"
        "from harness.tracking import RunLog\n"
        "log = RunLog(sys.argv[1])\n"
        "if os.fork() == 0: time.sleep(30); os._exit(0)\n"
        "print('open', flush=True); time.sleep(30)\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"open\n"
        writer.kill()
        writer.wait()
        RunLog(tmp_path).close()
    finally:
        os.killpg(writer.pid, signal.SIGKILL)
        writer.communicate()


def test_a_torn_last_line_is_passed_over_and_never_joined_to_the_next(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.write("step", {"loss": 1.0}, step=0)
    [segment] = segments(log_dir(tmp_path))
    whole = segment.read_bytes()
    before_end = whole[:-1].rfind(b"\n") + 1
    for cut in range(before_end, len(whole)):
        segment.write_bytes(whole[:cut])
        with RunLog(tmp_path) as log:
            log.write("step", {"loss": 2.0}, step=1)
        assert losses(tmp_path) == [(0, 0, 1.0), (1, 1, 2.0)]
        segments(log_dir(tmp_path))[-1].unlink()


def test_a_follower_waits_for_the_rest_of_a_line(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    folder.mkdir()
    path = folder / "00000000.jsonl"
    path.write_bytes(b'{"kind":"step","attempt":0,"step":1,"time":1.0,"va')
    follower = Follower(folder)
    assert follower.read() == []
    with path.open("ab") as file:
        file.write(b'lues":{"loss":2.0}}\n{"ki')
    assert [r.values for r in follower.read()] == [{"loss": 2.0}]
    assert follower.read() == []


def test_a_damaged_line_costs_itself_alone(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        for step in range(3):
            log.write("step", {"loss": float(step)}, step=step)
    [segment] = segments(log_dir(tmp_path))
    lines = segment.read_bytes().split(b"\n")
    lines[2] = b"\0" * len(lines[2])
    segment.write_bytes(b"\n".join(lines))
    assert losses(tmp_path) == [(0, 0, 0.0), (0, 2, 2.0)]


def test_segments_are_cut_at_line_ends_and_read_as_one_log(tmp_path: Path) -> None:
    with RunLog(tmp_path, segment_bytes=1000) as log:
        for step in range(100):
            log.write("step", {"loss": math.nan if step % 7 == 0 else step}, step=step)
    assert len(segments(log_dir(tmp_path))) > 5
    assert [step for _, step, _ in losses(tmp_path)] == list(range(100))


def test_lines_longer_than_what_is_read_at_once_are_whole(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        for step in range(3):
            log.write("step", {f"{step}/{i}": 1.0 for i in range(10_000)}, step=step)
    follower, sizes = Follower(log_dir(tmp_path)), []
    while new := follower.read(max_bytes=1000):
        sizes += [len(record.values) for record in new if record.kind == "step"]
    assert sizes == [10_000] * 3


def test_a_follower_goes_on_from_a_kept_position(tmp_path: Path) -> None:
    with RunLog(tmp_path, segment_bytes=500) as log:
        for step in range(50):
            log.write("step", {"loss": 0.0}, step=step)
    position, steps = Follower(log_dir(tmp_path)).position, []
    while True:
        follower = Follower(log_dir(tmp_path), position)
        new = follower.read(max_bytes=300)
        if not new:
            break
        steps += [r.step for r in new if r.kind == "step"]
        position = follower.position
    assert steps == list(range(50))


def test_many_threads_write_whole_lines(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:

        def write(thread: int) -> None:
            for i in range(200):
                log.write("step", {"loss": float(thread)}, step=i)

        threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(losses(tmp_path)) == 800


def test_a_disk_that_refuses_and_recovers_loses_and_tears_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The write is replaced by one that takes a part of the line, then nothing, then everything again."""
    log = RunLog(tmp_path)
    write, budget = os.write, [25]

    def stingy(fd: int, data: bytes) -> int:
        if budget[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = data[: budget[0]]
        budget[0] -= len(taken)
        return write(fd, taken)

    monkeypatch.setattr("harness.runlog.segments.os.write", stingy)
    monkeypatch.setattr("harness.runlog.segments.RETRY_S", 0.0)
    for step in range(5):
        log.write("step", {"loss": float(step)}, step=step)
    assert losses(tmp_path) == []
    budget[0] = 10**9
    log.write("step", {"loss": 5.0}, step=5)
    assert losses(tmp_path) == [(0, step, float(step)) for step in range(6)]
    log.close()
    said = [r.getMessage() for r in caplog.records]
    assert sum("No space left" in line for line in said) == 1
    assert any("takes records again" in line for line in said)


def test_a_run_directory_that_cannot_be_made_is_an_error_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrackingError, match="cannot be written"):
        RunLog(tmp_path / "file" / "run")


@pytest.mark.parametrize("step", [-1, 2**63, 1.5, "3"])
def test_a_step_that_is_no_whole_number_is_refused(tmp_path: Path, step: object) -> None:
    with RunLog(tmp_path) as log, pytest.raises(TrackingError, match="the step is"):
        log.write("step", {"loss": 1.0}, step=step)  # type: ignore[arg-type]


def test_writing_after_close_and_unknown_kinds_are_refused(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    with pytest.raises(TrackingError, match="kind is 'metric'"):
        log.write("metric", {})
    log.close()
    log.close()
    with pytest.raises(TrackingError, match="is closed"):
        log.write("step", {}, step=1)


def test_the_end_says_how_the_block_was_left(tmp_path: Path) -> None:
    for error, state in ((ValueError, "crashed"), (KeyboardInterrupt, "stopped")):
        with pytest.raises(error), RunLog(tmp_path):
            raise error
        assert everything(tmp_path)[-1].values == {"state": state}
