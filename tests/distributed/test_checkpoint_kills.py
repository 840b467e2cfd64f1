"""Processes killed at any moment: what is committed is whole, the resumed run is the uninterrupted one."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.checkpoint import Checkpointer, writer
from harness.errors import CheckpointError
from tests.support.checkpoints import TinyRun, digest
from tests.support.distributed import RanksFailed, run_ranks

LAST_STEP = 60
SAVE_EVERY = 2


def train(rank: int, world_size: int, directory: str, kind: str, doom: dict[int, float]) -> dict[int, str]:
    """Resumes, trains to the end, and gives the digest of each step on the way; may be killed meanwhile.

    Args:
        doom: After how many seconds which rank is killed.
    """
    run = TinyRun(kind, rank, world_size, dropout=0.2)
    seen = {}
    with Checkpointer(directory, healthy_after=4) as checkpointer:
        checkpointer.load(run.state())
        seen[run.step] = digest(run)
        if rank in doom:
            threading.Timer(doom[rank], os.kill, (os.getpid(), signal.SIGKILL)).start()
        while run.step < LAST_STEP:
            run.train(1)
            checkpointer.observe(run.step)
            seen[run.step] = digest(run)
            if run.step % SAVE_EVERY == 0:
                checkpointer.save(run.step, run.state())
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_run_killed_again_and_again_ends_as_the_uninterrupted_one(tmp_path: Path, kind: str) -> None:
    rng = random.Random(7)
    expected = run_ranks(train, 2, str(tmp_path / "whole"), kind, {})
    directory = tmp_path / "killed"
    kills = 0
    for _ in range(5):
        doomed, delay = rng.choice([[0], [1], [0, 1]]), rng.uniform(0.0, 0.4)
        try:
            _check(expected, run_ranks(train, 2, str(directory), kind, dict.fromkeys(doomed, delay)))
        except RanksFailed as failure:
            kills += f"exit code -{int(signal.SIGKILL)}" in str(failure)
    assert kills > 1
    _check(expected, run_ranks(train, 2, str(directory), kind, {}))


def _check(expected: list[dict[int, str]], resumed: list[dict[int, str]]) -> None:
    for whole, part in zip(expected, resumed, strict=True):
        assert {step: whole[step] for step in part} == part
        assert max(part) == LAST_STEP


_EVENTS = ("open", "os.mkdir", "os.rename", "os.rmdir", "os.remove", "os.chmod", "os.listdir", "os.scandir")


def die_at_event(rank: int, world_size: int, directory: str, number: int) -> None:
    """Saves step 1, commits it, saves step 2, and is killed at the n-th file operation of that."""
    with Checkpointer(directory, keep_last=1, healthy_after=1) as checkpointer:
        checkpointer.save(1, {"x": torch.full((100,), 1.0)})
        checkpointer.wait()
        left = number

        def count(event: str, args: tuple[Any, ...]) -> None:
            nonlocal left
            if event in _EVENTS and threading.current_thread().name.startswith("checkpoint"):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        checkpointer.save(2, {"x": torch.full((100,), 2.0)})
        checkpointer.wait()
        left = 1 << 30


def test_there_is_no_file_operation_at_which_a_kill_loses_or_tears_a_checkpoint(tmp_path: Path) -> None:
    found = []
    for number in range(200):
        directory = tmp_path / str(number)
        try:
            run_ranks(die_at_event, 1, str(directory), number)
            break
        except RanksFailed:
            found.append(_load(directory))
        # The dead save's remains do not hinder the next one, and are cleaned up by it.
        with Checkpointer(directory) as checkpointer:
            checkpointer.save(3, {"x": torch.ones(1)})
        assert not list(directory.glob(".saving-*"))
    assert len(found) > 8
    assert set(found) == {1, 2}
    assert found == sorted(found)  # step 1 until the commit, step 2 from then on


def _load(directory: Path) -> int:
    state: dict[str, Any] = {"x": None}
    with Checkpointer(directory) as checkpointer:
        step = checkpointer.load(state)
    assert step is not None
    assert state["x"].equal(torch.full((100,), float(step)))
    return step


def fail_to_write(rank: int, world_size: int, directory: str, when: str) -> tuple[list[str], int | None]:
    """Rank 1's disk is full at its second save; all ranks see the failure, and the third succeeds."""
    real, said = writer.write_shard, []

    def failing(path: Path, *args: Any) -> Any:
        if rank == 1 and when in str(path):
            raise OSError(28, "No space left on device")
        return real(path, *args)

    writer.write_shard = failing
    run = TinyRun("ddp", rank, world_size)
    with Checkpointer(directory) as checkpointer:
        for step in (1, 2, 3):
            run.train(1)
            checkpointer.save(step, run.state())
            run.train(1)
            try:
                checkpointer.wait()
            except CheckpointError as error:
                said.append(f"{step}: {error}")
        return said, checkpointer.load(run.state())


def test_a_full_disk_on_one_rank_fails_the_save_on_all_and_training_goes_on(tmp_path: Path) -> None:
    for said, step in run_ranks(fail_to_write, 2, str(tmp_path), "00000002"):
        assert said == ["2: rank 1: OSError: [Errno 28] No space left on device."]
        assert step == 3
    assert sorted(os.listdir(tmp_path)) == ["step-00000001", "step-00000003"]


def give_up(rank: int, world_size: int, directory: str, when_busy: Any) -> str:
    """Rank 1's disk hangs; the ranks give up at the same save."""
    real = writer.write_shard
    if rank == 1:
        writer.write_shard = lambda *args: (threading.Event().wait(3), real(*args))[1]
    checkpointer = Checkpointer(directory, when_busy=when_busy, give_up_after_s=0.5)
    for step in range(100):
        try:
            checkpointer.save(step, {"x": step})
        except CheckpointError as error:
            return f"{step}: {error}"
        threading.Event().wait(0.05)
    return "never"


@pytest.mark.parametrize("when_busy", ["wait", "drop"])
def test_ranks_give_up_together_when_a_disk_hangs(tmp_path: Path, when_busy: str) -> None:
    first, second = run_ranks(give_up, 2, str(tmp_path), when_busy)
    assert first == second
    assert "nothing could be saved for 0.5 s: the save under way does not end" in first
