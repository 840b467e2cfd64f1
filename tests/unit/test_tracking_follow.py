"""Keeping a mirror in step: each record once, whatever fails between the record and the commit."""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event

from harness.runlog.codec import Record
from harness.runlog.writer import RunLog
from harness.tracking import mirror as mirror_module
from harness.tracking.mirror import Mirror, MirroredRun, MirrorFollower, StartAgain
from harness.tracking.settings import MirrorSettings
from harness.tracking.tensorboard import TensorBoardMirror


class Shelf(Mirror):
    """A mirror that keeps steps in a list, and fails whenever its dice say so."""

    def __init__(self, kept: list[int], dice: random.Random, state: Mapping[str, Any]) -> None:
        self._kept, self._dice = kept, dice
        self._fail()
        del kept[state.get("length", 0) :]

    def take(self, record: Record) -> None:
        if record.step is not None:
            self._kept.append(record.step)
        self._fail(0.01)

    def commit(self) -> dict[str, Any] | None:
        self._fail()
        return None if self._dice.random() < 0.3 else {"length": len(self._kept)}

    def idle(self) -> None:
        self._fail()

    def abandon(self) -> None:
        pass

    def close(self, end: Mapping[str, Any] | None) -> dict[str, Any]:
        self._fail()
        return {"length": len(self._kept)}

    def _fail(self, probability: float = 0.2) -> None:
        if self._dice.random() < probability:
            raise StartAgain if self._dice.random() < 0.1 else OSError("the dice said so")


@pytest.mark.parametrize("seed", range(10))
def test_each_record_is_taken_once_whatever_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    for name in ("COMMIT_EVERY_S", "FIRST_RETRY_S", "LAST_RETRY_S"):
        monkeypatch.setattr(mirror_module, name, 0.0)
    dice, kept, ended = random.Random(seed), list[int](), threading.Event()
    follower = MirrorFollower(
        tmp_path, "shelf", lambda state: Shelf(kept, dice, state), ended=ended, poll_s=0.0
    )
    with RunLog(tmp_path, segment_bytes=2000) as log:
        worker = threading.Thread(target=follower.run)
        worker.start()
        for step in range(300):
            log.write("step", {"train/loss": 1.0}, step=step)
    ended.set()
    worker.join(30)
    assert follower.done.is_set()
    assert kept == list(range(300))


def test_a_state_file_that_is_damaged_means_beginning_again(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.write("step", {"train/loss": 1.0}, step=0)
    ended, kept = threading.Event(), [1, 2, 3]
    ended.set()
    state = tmp_path / "log" / "mirrors" / "shelf.json"
    state.parent.mkdir()
    state.write_text('{"positions": {".": {"segm')
    dice = random.Random(0)
    dice.random = lambda: 1.0  # type: ignore[method-assign]  # it never fails
    MirrorFollower(tmp_path, "shelf", lambda state: Shelf(kept, dice, state), ended=ended, poll_s=0.0).run()
    assert kept == [0]


def shown_in(folder: Path) -> MirroredRun:
    return MirroredRun(folder, MirrorSettings(tensorboard_dir=str(folder)))


def step(number: int) -> Record:
    return Record("step", 0, number, 1000.0 + number, {"train/loss": float(number)})


def steps_in(folder: Path) -> list[int]:
    [path] = folder.glob("*tfevents*")
    events = [Event.FromString(raw) for raw in RawEventFileLoader(str(path)).Load()]
    return [event.step for event in events if event.summary.value]


def test_what_tensorboard_got_after_the_last_commit_is_cut_off_again(tmp_path: Path) -> None:
    first = TensorBoardMirror(shown_in(tmp_path), {})
    first.take(step(0))
    state = first.commit()
    first.take(step(1))
    first.commit()  # it dies before this state is kept
    again = TensorBoardMirror(shown_in(tmp_path), state)
    for number in (1, 2):
        again.take(step(number))
    again.commit()
    assert steps_in(tmp_path) == [0, 1, 2]


def test_an_event_file_that_lost_its_end_is_built_again(tmp_path: Path) -> None:
    mirror = TensorBoardMirror(shown_in(tmp_path), {})
    mirror.take(step(0))
    state = mirror.commit()
    [path] = tmp_path.glob("*tfevents*")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StartAgain):
        TensorBoardMirror(shown_in(tmp_path), state)


def test_other_peoples_event_files_are_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "events.out.tfevents.1.host"
    other.write_text("theirs")
    TensorBoardMirror(shown_in(tmp_path), {})
    assert other.read_text() == "theirs"
