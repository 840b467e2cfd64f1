"""When a rank is late, and for whom the others wait."""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path

import pytest

from harness.config import WatchdogConfig
from harness.training.late import RankState, late_ranks, limit_s
from harness.training.progress import Phase, Progress
from harness.training.stacks import innermost, is_debugged, waits_for_others, write_stacks

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
