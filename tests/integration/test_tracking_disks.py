"""Disks that fill up or become read-only under a run, for real: on small file systems of their own."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from harness.tracking import RunLog, open_run, start_mirrors, sync_run
from tests.support.wandb_offline import history

QUIET: dict[str, Any] = {"system_every_s": 0.0, "alerts": ()}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[Path, int], Path]]:
    """Mounts file systems of a given number of MiB; skips where that is not allowed."""
    mounted: list[Path] = []

    def mount(path: Path, size_mib: int) -> Path:
        path.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", str(path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            pytest.skip(f"no file system can be mounted here: {error}")
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        mounted.append(path)
        return path

    yield mount
    for path in reversed(mounted):
        subprocess.run(["umount", "-l", str(path)], check=True)


def fill(path: Path) -> Path:
    junk = path / "junk"
    with contextlib.suppress(OSError), junk.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    with contextlib.suppress(OSError), junk.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(1))
    with pytest.raises(OSError) as full:
        (path / "more").write_bytes(bytes(1 << 16))
    assert full.value.errno == errno.ENOSPC
    return junk


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def write_steps(log: RunLog, steps: range) -> None:
    for step in steps:
        log.write("step", {"train/loss": float(step)}, step=step)


def shown(run_dir: Path) -> list[int]:
    accumulator = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    return [event.step for event in accumulator.Reload().Scalars("train/loss")]


def test_a_full_disk_costs_no_record_and_sync_completes_the_mirrors(
    small_disk: Callable[[Path, int], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk = small_disk(tmp_path / "disk", 32)
    log = RunLog(disk / "run")
    handle = start_mirrors(disk / "run", wandb="offline", **QUIET)
    write_steps(log, range(100))
    wait_until((disk / "run" / "log" / "mirrors" / "wandb.json").exists)  # mirrors are under way
    junk = fill(disk)
    began = time.monotonic()
    write_steps(log, range(100, 3000))
    assert time.monotonic() - began < 30.0  # the disk would stay full for ever
    assert "No space left on device" in caplog.text
    time.sleep(3.0)  # mirrors meet the full disk too
    junk.unlink()
    time.sleep(1.1)  # the log tries again every second
    write_steps(log, range(3000, 3100))
    log.close()
    handle.close(30)
    assert open_run(disk / "run").scalars("train/loss").steps.tolist() == list(range(3100))
    assert sync_run(disk / "run", wandb="offline") == ["tensorboard", "wandb"]
    assert shown(disk / "run") == list(range(3100))
    assert [row["step"] for row in history(disk / "run") if "train/loss" in row] == list(range(3100))
    assert "takes records again" in caplog.text
    assert "cannot be written" in caplog.text


def test_a_disk_that_stays_full_loses_records_aloud_and_never_training(
    small_disk: Callable[[Path, int], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk = small_disk(tmp_path / "disk", 4)
    log = RunLog(disk / "run")
    write_steps(log, range(10))
    fill(disk)
    write_steps(log, range(10, 2000))
    log.close()
    assert "could not be written and are lost" in caplog.text
    steps = open_run(disk / "run").scalars("train/loss").steps.tolist()
    assert steps == list(range(len(steps)))
    assert len(steps) >= 10


def test_a_tensorboard_folder_that_becomes_read_only_is_completed_when_it_can_be_written(
    small_disk: Callable[[Path, int], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = tmp_path / "run"
    folder = small_disk(run_dir / "tensorboard", 4)
    log = RunLog(run_dir)
    handle = start_mirrors(run_dir, **QUIET)
    write_steps(log, range(10))
    deadline = time.monotonic() + 20
    while not list(folder.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    write_steps(log, range(10, 20))
    log.close()
    assert not handle.close(timeout_s=4.0)
    assert os.strerror(errno.EROFS) in caplog.text
    subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
    assert sync_run(run_dir, timeout_s=30.0) == ["tensorboard"]
    assert shown(run_dir) == list(range(20))
