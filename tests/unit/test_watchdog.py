"""When a rank is late, and for whom the others wait."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.config import TrainConfig, WatchdogConfig
from harness.data import alive, num_signs, still_working
from harness.data.corpus import list_files, prepare
from harness.errors import TaskError
from harness.training.agreed import LONGEST_S
from harness.training.late import RankState, late_ranks, limit_s
from harness.training.progress import Phase, Progress
from harness.training.stacks import arose_waiting, innermost, is_debugged, waits_for_others, write_stacks
from harness.training.watchdog import Watchdog
from tests.support.distributed import run_ranks
from tests.support.runs import corpus

ON_TIME = RankState(rank=0, order=5, doing="training", age_s=1.0, limit_s=10.0, host="a", pid=1, beat=1)


def state(rank: int, order: int, *, late: bool = False, silent_s: float = 0.0) -> RankState:
    return dataclasses.replace(
        ON_TIME, rank=rank, order=order, age_s=11.0 if late else 1.0, silent_s=silent_s
    )


@pytest.mark.parametrize(
    ("states", "named"),
    [
        ([state(0, 5), state(1, 5)], []),
        ([state(0, 6, late=True), state(1, 5, late=True)], [1]),
        ([state(0, 6, late=True), state(1, 5)], []),  # rank 1 evaluates, and 0 waits for it
        ([state(0, 6), state(1, 5, late=True)], [1]),  # rank 0 evaluates already, and is in no hurry
        ([state(0, 5, late=True), state(1, 5)], []),
        ([state(0, 5, late=True), state(1, 5, late=True)], [0, 1]),
        ([state(0, 5, late=True), state(1, 5, silent_s=12.0)], [1]),  # stopped
        ([state(0, 5, late=True), state(1, 6, silent_s=12.0)], [1]),
        ([state(0, 6), state(1, 5, silent_s=12.0)], []),  # nobody has waited long
        ([state(0, 6, late=True), state(1, 5, silent_s=3.0)], []),  # holds the interpreter's lock
    ],
)
def test_those_furthest_behind_are_late_when_all_of_them_are(
    states: list[RankState], named: list[int]
) -> None:
    assert [late.rank for late in late_ranks(states, patience_s=270.0)] == named


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ([{"timed_out": True}, {}], [0, 1]),  # which of them does not wait is asked
        ([{"order": 6, "timed_out": True}, {}], [1]),
        ([{"timed_out": True}, {"silent_s": 12.0}], [1]),
        ([{"order": 6, "waits": True, "age_s": 9.0}, {"age_s": 9.5}], [1]),
        ([{"order": 6, "age_s": 9.0}, {"age_s": 9.5}], []),  # rank 0 has work of its own
        ([{"order": 6, "waits": True, "age_s": 7.0}, {"age_s": 9.5}], []),  # and may wait a little longer
        ([{"order": 6, "waits": True, "age_s": 9.0}, {"age_s": 2.0}], []),  # rank 1 goes on
        ([{"waits": True, "age_s": 9.0}, {"age_s": 9.5}], []),  # both may be in a long backward pass
    ],
)
def test_a_rank_that_has_waited_as_long_as_it_may_says_for_whom(
    changes: list[dict[str, Any]], named: list[int]
) -> None:
    states = [dataclasses.replace(ON_TIME, rank=rank, **change) for rank, change in enumerate(changes)]
    assert [late.rank for late in late_ranks(states, patience_s=8.0)] == named


def test_a_save_is_bounded_from_the_first_on_and_by_how_long_whole_saves_take() -> None:
    config, progress = WatchdogConfig(min_other_s=240.0, ratio=10.0), Progress()
    progress.enter(Phase.SAVE, 0)
    assert limit_s(config, progress, compiles=False) == 240.0
    progress.learn(Phase.SAVE, 50.0)
    assert limit_s(config, progress, compiles=False) == 500.0


def test_a_limit_is_learned_has_a_floor_and_begins_generous() -> None:
    config = WatchdogConfig(min_step_s=60.0, min_other_s=240.0, ratio=10.0, first_s=1800.0)
    progress = Progress()
    limits: dict[Phase, list[float]] = {phase: [] for phase in Phase}
    for step in range(5):
        for phase in (Phase.DATA, Phase.FORWARD, Phase.EVALUATION):
            progress.enter(phase, step)
            limits[phase].append(limit_s(config, progress, compiles=False))
    assert limits[Phase.FORWARD] == [1800.0] * 3 + [60.0] * 2
    assert limits[Phase.DATA] == limits[Phase.EVALUATION] == [1800.0] * 3 + [240.0] * 2
    progress.slowest_s[Phase.EVALUATION] = 70.0
    assert limit_s(config, progress, compiles=False) == 700.0
    progress.enter(Phase.FORWARD, 5)
    assert limit_s(config, progress, compiles=True) == 240.0


def test_an_odd_slow_time_is_forgotten() -> None:
    progress = Progress()
    progress.enter(Phase.DATA, 0)
    progress.slowest_s[Phase.DATA] = 100.0
    for step in range(500):
        progress.enter(Phase.DATA, step)
    assert progress.slowest_s[Phase.DATA] < 1.0


def test_a_thread_tells_where_it_is(tmp_path: Path) -> None:
    ended = threading.Event()

    def lingers() -> None:
        ended.wait(20.0)

    thread = threading.Thread(target=lingers)
    thread.start()
    while "lingers" not in innermost(thread.ident or 0):
        time.sleep(0.01)
    write_stacks(tmp_path / "stacks.txt", "a heading")
    seen = (is_debugged(thread.ident or 0), waits_for_others(thread.ident or 0))
    ended.set()
    thread.join()
    assert seen == (False, False)
    text = (tmp_path / "stacks.txt").read_text()
    assert text.startswith("a heading\n")
    assert "in lingers" in text
    assert f"in {test_a_thread_tells_where_it_is.__name__}" in text


def test_a_thread_that_waits_for_another_one_is_where_that_one_is() -> None:
    ended = threading.Event()
    worker = threading.Thread(target=lambda: lingers_for(ended))
    waiting = threading.Thread(target=lambda: worker.join())
    for thread in (worker, waiting):
        thread.start()
    while "lingers_for" not in innermost(waiting.ident or 0):
        time.sleep(0.01)
    ended.set()
    waiting.join()


def lingers_for(ended: threading.Event) -> None:
    ended.wait(20.0)


def test_an_error_out_of_torchs_communication_is_told_from_others() -> None:
    def communicates() -> None:
        torch.distributed.all_reduce(torch.zeros(1))  # without a group

    def wraps() -> None:
        try:
            communicates()
        except ValueError as error:
            raise TaskError("a loss failed") from error

    for function, expected in ((communicates, True), (wraps, True), (lambda: 1 / 0, False)):
        with pytest.raises((ValueError, TaskError, ZeroDivisionError)) as raised:
            function()
        assert arose_waiting(raised.value) == expected


def test_a_thread_in_a_debugger_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    import pdb

    seen = []

    class Asks(io.StringIO):
        def readline(self, size: int | None = -1) -> str:  # type: ignore[override]
            seen.append(is_debugged(threading.get_ident()))
            return "continue\n"

    assert not is_debugged(threading.get_ident())
    pdb.Pdb(stdin=Asks(), stdout=io.StringIO(), nosigint=True, readrc=False).set_trace()
    while not seen:
        time.sleep(0.01)
    assert seen == [True]


def _prepares_data(rank: int, world_size: int, folder: str) -> None:
    config = TrainConfig(runs_dir=folder, watchdog=WatchdogConfig(min_step_s=0.6))
    with Watchdog(config) as watchdog:

        def age_s() -> float:
            return float(json.loads(watchdog._heartbeats.word)["age_s"])

        while age_s() < 0.2:
            time.sleep(0.01)
        silent_s = age_s()
        still_working()
        while age_s() >= silent_s:
            time.sleep(0.01)


def test_while_data_is_prepared_only_silence_counts(tmp_path: Path) -> None:
    run_ranks(_prepares_data, 1, str(tmp_path))
    files = list_files([str(corpus(tmp_path / "text", num_files=20))])
    before = Progress().signs_of_life()
    prepare(files, val_frac=0.2, cache_dir=tmp_path / "cache")
    assert Progress().signs_of_life() >= before + len(files)


def test_a_call_that_takes_long_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alive, "_EVERY_S", 0.001)
    with alive.working():
        before = num_signs()
        while num_signs() < before + 3:
            time.sleep(0.001)
    over = num_signs()
    time.sleep(0.01)
    assert num_signs() == over


def test_a_rank_that_prepares_for_hours_is_waited_for_and_the_watchdog_decides_how_long() -> None:
    assert 24 * WatchdogConfig().first_s <= LONGEST_S
