"""File work beside training: it is waited for only as long as it may take, and raises on no rank alone."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from harness.checkpoint import Checkpointer, checkpointer
from harness.checkpoint.store import Saved, Store
from harness.checkpoint.tasks import Tasks
from harness.errors import CheckpointError


def test_what_was_given_before_is_waited_for_and_nothing_that_comes_after() -> None:
    tasks, done, ended = Tasks(), threading.Event(), threading.Event()

    def again() -> None:
        time.sleep(0.002)
        if not ended.is_set():
            tasks.add(again)

    tasks.add(done.set)
    tasks.add(again)  # from here on the queue is never empty
    try:
        assert tasks.join(3)
        assert done.is_set()
    finally:
        ended.set()
    assert tasks.join(3)


def test_a_thread_that_cannot_be_started_raises_nothing_and_the_task_is_done_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tasks, done = Tasks(), list[int]()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", _no_more_threads)
        tasks.add(lambda: done.append(1))
        assert not tasks.join(3)
    tasks.add(lambda: done.append(2))
    assert tasks.join(3)
    assert done == [1, 2]


def _no_more_threads(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_a_checkpoint_that_cannot_be_marked_is_tried_again_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marked = Store.mark_healthy
    tries = list[int]()

    def fail(store: Store, saved: Saved) -> None:
        tries.append(saved.step)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Store, "mark_healthy", fail)
    with Checkpointer(tmp_path, healthy_after=1) as saves:
        saves.save(1, {"x": 1})
        saves.wait()
        for step in range(2, 100):
            saves.observe(step)
            assert len(saves._tasks._waiting) <= 1
            time.sleep(0.001)
        saves.wait()
        assert tries == [1]
        monkeypatch.setattr(Store, "mark_healthy", marked)
        saves._health._retry_at = time.monotonic()
        saves.observe(100)
        saves.wait()
    assert (tmp_path / "step-00000001/healthy").exists()


def test_a_mark_that_hangs_lets_no_queue_grow_and_fails_the_next_save_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = threading.Event()

    def hang(store: Store, saved: Saved) -> None:
        goes_on.wait(30)

    monkeypatch.setattr(Store, "mark_healthy", hang)
    saves = Checkpointer(tmp_path, healthy_after=1, timeout_s=0.4)
    saves.save(1, {"x": 1})
    saves.wait()
    for step in range(2, 100):
        saves.observe(step)
    assert len(saves._tasks._waiting) <= 1
    saves.save(100, {"x": 1})
    assert saves._writer.join(5)
    with pytest.raises(CheckpointError, match="still being marked or deleted"):
        saves.close(after_error=True)
    goes_on.set()


@pytest.mark.parametrize("after_error", [False, True])
def test_the_end_waits_for_no_deletion_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after_error: bool
) -> None:
    goes_on = threading.Event()
    monkeypatch.setattr(Store, "delete", lambda store, saved: goes_on.wait(30))
    monkeypatch.setattr(checkpointer, "TASKS_AT_END_S", 0.2)
    saves = Checkpointer(tmp_path, keep_last=1)
    saves.save(1, {"x": 1})
    saves.wait()
    saves.save(2, {"x": 2})
    assert saves._writer.join(5)
    began = time.monotonic()
    saves.close(after_error=after_error)
    assert time.monotonic() - began < 5
    goes_on.set()


def test_after_an_error_a_save_that_hangs_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on = threading.Event()
    begin = Store.begin

    def hang(store: Store, step: int) -> Path:
        goes_on.wait(30)
        return begin(store, step)

    monkeypatch.setattr(Store, "begin", hang)
    began = time.monotonic()
    saves = Checkpointer(tmp_path, timeout_s=0.2)
    saves.save(1, {"x": 1})
    saves.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert time.monotonic() - began < 5
    goes_on.set()
    assert saves._writer.join(5)
