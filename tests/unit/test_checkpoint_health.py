"""Which checkpoints count as healthy, which are kept, and what a rollback goes back to."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.checkpoint import Checkpointer
from harness.checkpoint.store import Saved, Store
from harness.errors import CheckpointError
from tests.support.checkpoints import TinyRun, digest


def save(checkpointer: Checkpointer, step: int, **options: Any) -> None:
    checkpointer.save(step, {"x": step}, **options)
    checkpointer.wait()


def observe(checkpointer: Checkpointer, first: int, last: int, *, incident: bool = False) -> None:
    for step in range(first, last + 1):
        checkpointer.observe(step, incident=incident)
    checkpointer.wait()


def healthy_steps(directory: Path) -> list[int]:
    return sorted(int(path.parent.name.removeprefix("step-")) for path in directory.glob("step-*/healthy"))


def test_a_checkpoint_is_healthy_after_enough_clean_steps_and_not_before(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, healthy_after=5) as checkpointer:
        observe(checkpointer, 1, 10)
        save(checkpointer, 10)
        observe(checkpointer, 11, 14)
        assert healthy_steps(tmp_path) == []
        observe(checkpointer, 15, 15)
        assert healthy_steps(tmp_path) == [10]


def test_an_incident_starts_the_count_anew(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, healthy_after=5) as checkpointer:
        observe(checkpointer, 1, 10)
        save(checkpointer, 10)
        observe(checkpointer, 11, 13)
        checkpointer.observe(14, incident=True)
        observe(checkpointer, 15, 18)
        assert healthy_steps(tmp_path) == []
        observe(checkpointer, 19, 19)
        assert healthy_steps(tmp_path) == [10]


def test_a_resumed_run_counts_anew_and_promotes_what_the_run_before_left_pending(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, healthy_after=5) as checkpointer:
        observe(checkpointer, 1, 10)
        save(checkpointer, 10)
        observe(checkpointer, 11, 13)
    with Checkpointer(tmp_path, healthy_after=5) as checkpointer:
        assert checkpointer.load({"x": None}) == 10
        observe(checkpointer, 11, 14)
        assert healthy_steps(tmp_path) == []
        observe(checkpointer, 15, 15)
        assert healthy_steps(tmp_path) == [10]


def test_loading_can_be_limited_to_healthy_checkpoints(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, healthy_after=2) as checkpointer:
        save(checkpointer, 1)
        observe(checkpointer, 2, 3)
        save(checkpointer, 4)
        assert checkpointer.load({"x": None}) == 4
        assert checkpointer.load({"x": None}, healthy=True) == 1


def test_the_last_n_are_kept(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, keep_last=2) as checkpointer:
        for step in range(1, 6):
            save(checkpointer, step)
        assert checkpointer.steps() == [4, 5]


def test_the_best_and_every_mth_are_kept_besides(tmp_path: Path) -> None:
    metrics = {1: 5.0, 2: 1.0, 3: 4.0, 4: float("nan"), 5: 2.0, 6: 3.0, 7: 6.0, 8: 7.0}
    with Checkpointer(tmp_path, keep_last=1, keep_best=2, keep_every=3) as checkpointer:
        for step, metric in metrics.items():
            save(checkpointer, step, metric=metric)
        assert checkpointer.steps() == [2, 3, 5, 6, 8]


def test_the_last_healthy_checkpoint_is_never_rotated_away(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, keep_last=2, healthy_after=2) as checkpointer:
        save(checkpointer, 1)
        observe(checkpointer, 2, 3)
        for step in range(4, 12):  # incidents from here on: nothing newer proves itself
            checkpointer.observe(step, incident=True)
            save(checkpointer, step)
        assert checkpointer.steps() == [1, 10, 11]


def test_nothing_is_deleted_before_its_successor_is_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Checkpointer(tmp_path, keep_last=1) as checkpointer:
        save(checkpointer, 1)
        monkeypatch.setattr("harness.checkpoint.writer.write_shard", _full_disk)
        with pytest.raises(CheckpointError, match="No space left"):
            save(checkpointer, 2)
        assert checkpointer.steps() == [1]


def _full_disk(*args: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_rollback_restores_the_last_healthy_state_bit_for_bit(tmp_path: Path, in_memory: bool) -> None:
    run = TinyRun("plain", dropout=0.2)
    with Checkpointer(tmp_path, healthy_after=3, in_memory=in_memory) as checkpointer:
        expected = {}
        for _ in range(10):
            run.train(1)
            checkpointer.observe(run.step)
            if run.step % 2 == 0:
                expected[run.step] = digest(run)
                checkpointer.save(run.step, run.state())
                checkpointer.wait()
        assert checkpointer.rollback(run.state()) == 6
        assert digest(run) == expected[6]
        assert checkpointer.steps() == [6]
        run.train(2)
        assert digest(run) == expected[8]


def test_a_rollback_from_memory_needs_no_disk(tmp_path: Path) -> None:
    run = TinyRun("plain")
    with Checkpointer(tmp_path / "gone", healthy_after=1, in_memory=True) as checkpointer:
        checkpointer.save(0, run.state())
        checkpointer.wait()
        checkpointer.observe(1)
        expected = digest(run)
        (tmp_path / "gone").rename(tmp_path / "elsewhere")
        run.train(2)
        assert checkpointer.rollback(run.state()) == 0
        assert digest(run) == expected


def test_an_abandoned_branch_is_neither_resumed_nor_kept_for_ever(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, healthy_after=2) as checkpointer:
        save(checkpointer, 2)
        observe(checkpointer, 3, 4)
        save(checkpointer, 4)
        assert checkpointer.rollback({"x": None}) == 2
        assert sorted(os.listdir(tmp_path)) == ["abandoned-step-00000004", "step-00000002"]
    with Checkpointer(tmp_path, healthy_after=2) as checkpointer:
        assert checkpointer.load({"x": None}) == 2
        save(checkpointer, 4)
        assert (tmp_path / "abandoned-step-00000004").exists()
        observe(checkpointer, 3, 6)
        save(checkpointer, 6)
        assert sorted(os.listdir(tmp_path)) == ["step-00000002", "step-00000004", "step-00000006"]


def test_saving_the_same_step_again_replaces_it_without_a_moment_without_one(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        for value in (1, 2):
            checkpointer.save(5, {"x": value})
            checkpointer.wait()
        state: dict[str, Any] = {"x": None}
        assert checkpointer.load(state) == 5
        assert state["x"] == 2
    assert os.listdir(tmp_path) == ["step-00000005.1"]


def test_a_rollback_without_a_healthy_checkpoint_says_so(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 1)
        with pytest.raises(CheckpointError, match="no healthy checkpoint"):
            checkpointer.rollback({"x": None})


def on_a_slow_disk(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, list[str]]:
    """Marks and deletions wait for the event; in which threads they were done."""
    goes_on, threads = threading.Event(), list[str]()
    for name in ("mark_healthy", "delete"):
        action = getattr(Store, name)

        def slow(store: Store, saved: Saved, action: Any = action) -> None:
            threads.append(threading.current_thread().name)
            assert goes_on.wait(30)
            action(store, saved)

        monkeypatch.setattr(Store, name, slow)
    return goes_on, threads


def test_training_waits_for_no_mark_and_no_deletion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on, threads = on_a_slow_disk(monkeypatch)
    with Checkpointer(tmp_path, keep_last=1, healthy_after=1) as checkpointer:
        checkpointer.save(1, {"x": 1})
        while not checkpointer.outcomes():
            time.sleep(0.01)
        for step in (2, 3):
            checkpointer.observe(step)  # marks step 1, which takes until `goes_on`
        checkpointer.save(3, {"x": 3})  # its deletions too
        checkpointer.observe(4)
        assert healthy_steps(tmp_path) == []
        goes_on.set()
        checkpointer.wait()
        assert healthy_steps(tmp_path) == [1]  # step 3 was not there yet when step 4 was observed
        assert checkpointer.steps() == [1, 3]
        checkpointer.observe(5)
        checkpointer.save(5, {"x": 5})
        checkpointer.wait()
        assert checkpointer.steps() == [3, 5]  # the last healthy one, and the newest
        assert healthy_steps(tmp_path) == [3]
    assert set(threads) == {"checkpoint-tasks"}


def test_the_disk_holds_no_more_than_one_save_that_is_to_be_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on, _ = on_a_slow_disk(monkeypatch)
    with Checkpointer(tmp_path, keep_last=1, when_busy="drop") as checkpointer:
        for step in range(1, 20):
            checkpointer.save(step, {"x": step})
            time.sleep(0.02)
        assert len(list(tmp_path.glob("step-*"))) == 2
        goes_on.set()
    assert len(list(tmp_path.glob("step-*"))) == 1


def test_memory_is_reused_and_bounded(tmp_path: Path) -> None:
    tensor = torch.zeros(1000)
    with Checkpointer(tmp_path, healthy_after=20, in_memory=True) as checkpointer:
        copies = set()
        for step in range(1, 60):
            checkpointer.observe(step)
            checkpointer.save(step, {"x": tensor})
            memory = checkpointer._memory
            assert memory is not None
            kept = [memory.good, *memory._pending]
            copies.update(snapshot.tensors["x"].data_ptr() for snapshot in kept if snapshot)
    assert len(copies) <= 3
