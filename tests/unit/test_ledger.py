"""Every second of a run's wall time is in one class of its ledger, over restarts, rollbacks and skips."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import orjson
import pytest

from harness import Callback
from harness.dashboard.views import run_view
from harness.runlog.ledger import Ledger, TimeClass, newest_ledger
from harness.runlog.preview import preview
from harness.runlog.reader import Run, open_run
from harness.tracking.overview import show_run, summarise
from harness.training import train
from harness.training.ledger import LedgerKeeper
from harness.training.progress import Phase, Progress
from tests.support.runs import tiny_config

STEP_S = 0.02


class Paced(Callback):
    """Makes steps, evaluations and saves last, so that they can be told from noise; stops once."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at, self.evaluated_s = stop_at, 0.0

    def on_step(self, run: Any, record: Any) -> None:
        time.sleep(STEP_S)
        run.stop.requested |= record.step == self.stop_at

    def on_eval(self, run: Any, step: int, metrics: Any) -> None:
        time.sleep(0.1)
        self.evaluated_s += 0.1


def test_the_classes_sum_to_the_wall_time_over_restart_rollback_skips_evaluation_and_saves(
    tmp_path: Path,
) -> None:
    faults = ", ".join(f"{{step: {step}, kind: nan}}" for step in (4, 33, 34, 35))
    settings = (
        "--loop.steps=48",
        "--checkpoint.healthy_after=2",
        "--guard.max_consecutive_skips=2",
        "--guard.rollback_skip_steps=6",
        f"--faults=[{faults}]",
    )
    config = tiny_config(tmp_path, *settings)
    callbacks = [Paced(stop_at=14), Paced()]
    began = time.time()
    assert train(config, callbacks=callbacks[:1]).status == "stopped"
    time.sleep(0.5)
    assert train(config, callbacks=callbacks[1:]).status == "finished"
    run = open_run(tmp_path / "runs/tiny")
    assert run.events("rollback")
    ledger = run.ledger
    assert ledger is not None
    assert run.updated is not None
    assert ledger.is_finished
    assert ledger.steps_made == 48
    assert ledger.wall_s == pytest.approx(run.updated - began, rel=1e-3, abs=0.01)
    seconds = ledger.seconds
    assert seconds[TimeClass.RESTART] > 0.5
    assert seconds[TimeClass.SKIPPED] > 4 * 0.9 * STEP_S
    assert seconds[TimeClass.RECOMPUTED] > 4 * 0.9 * STEP_S  # from a healthy checkpoint to the failed step
    assert seconds[TimeClass.EVALUATION] > sum(one.evaluated_s for one in callbacks)
    assert seconds[TimeClass.CHECKPOINT] > 0
    assert seconds[TimeClass.START] > 0
    assert 0 < ledger.goodput_frac < ledger.ettr_frac < 1
    every_viewer_shows_the_same(tmp_path / "runs/tiny", run)


def every_viewer_shows_the_same(directory: Path, run: Run) -> None:
    assert run.ledger is not None
    assert run.ledger == newest_ledger(directory) == preview(directory).ledger
    assert summarise(run)["ledger"] == dict(run.ledger.seconds)
    view = run_view(run)["ledger"]
    assert sum(one["seconds"] for one in view["classes"]) == pytest.approx(run.ledger.wall_s)
    assert "where the time went" in show_run(directory)
    assert "goodput" in show_run(directory)


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "time", lambda: self.now + 1e9)
        monkeypatch.setattr(time, "clock_gettime", lambda clock: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def keeper(progress: Progress, before: Ledger | None = None) -> tuple[LedgerKeeper, list[Ledger]]:
    written: list[Ledger] = []
    return LedgerKeeper(progress, before, written.append), written


def step(
    progress: Progress, clock: Clock, number: int, *, compute_s: float = 2.0, data_s: float = 1.0
) -> None:
    progress.enter(Phase.DATA, number)
    clock.now += data_s
    progress.enter(Phase.FORWARD, number)
    clock.now += compute_s
    progress.enter(Phase.RECORDS, number)


def shares(ledger: Ledger) -> dict[str, float]:
    return {str(kind): pytest.approx(spent) for kind, spent, _ in ledger.rows()}


def test_what_first_steps_take_longer_is_start_and_what_later_ones_do_is_stalled(clock: Clock) -> None:
    progress = Progress()
    book, written = keeper(progress)
    clock.now += 7
    for number in range(12):
        step(progress, clock, number, compute_s={0: 20.0, 9: 50.0}.get(number, 2.0))
        book.count(number, is_skipped=False)
    book.close(is_finished=True)
    assert shares(written[-1]) == {"start": 7 + 18, "compute": 24, "data": 12, "stalled": 48}


def test_a_hang_is_stalled_and_the_time_until_the_next_attempt_restart(clock: Clock) -> None:
    progress = Progress()
    book, written = keeper(progress)
    for number in range(8):
        step(progress, clock, number)
        book.count(number, is_skipped=False)
    progress.enter(Phase.SAVE, 8)
    clock.now += 60
    book.close(hangs=True)
    assert shares(written[-1]) == {"compute": 16, "data": 8, "stalled": 60}
    clock.now += 100
    progress = Progress(begun=clock.now - 10)
    book, written = keeper(progress, before=written[-1])
    for number in range(4, 12):  # of which 4 were made before
        step(progress, clock, number)
        book.count(number, is_skipped=number in (5, 9))
    book.close()
    assert shares(written[-1]) == {
        "compute": 16 + 6,
        "data": 8 + 3,
        "stalled": 60,
        "restart": 90,
        "start": 10,
        "recomputed": 12,
        "skipped": 3,
    }


def test_the_account_is_written_every_15_s_and_before_what_may_be_the_end(clock: Clock) -> None:
    progress = Progress()
    _, written = keeper(progress)
    for number in range(40):  # of 3 s
        step(progress, clock, number)
    assert 120 / 18 <= len(written) <= 1 + 120 / 15
    progress.enter(Phase.SAVE, 40)
    assert shares(written[-1]) == {"compute": 80, "data": 40}


def test_the_newest_account_is_found_from_the_end_whatever_follows_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.mkdir()
    head = '{{"kind":"ledger","attempt":0,"step":null,"time":{},'
    line = head + '"values":{{"seconds":{{}},"steps_made":{}}}}}\n'
    other = orjson.dumps({"kind": "text", "attempt": 0, "step": 1, "time": 1.0, "values": {"a": "x" * 999}})
    early, late = (line.format(float(number), number).encode() for number in (1, 2))
    begun = b"".join([early, (other + b"\n") * 600, late, (other + b"\n") * 600, late[:40]])
    (log / "00000000.jsonl").write_bytes(begun)
    (log / "00000001.jsonl").write_bytes(other + b"\n")
    found = newest_ledger(tmp_path)
    assert found is not None
    assert (found.until, found.steps_made) == (2.0, 2)


def test_time_between_a_finished_attempt_and_the_next_one_is_nobodys(clock: Clock) -> None:
    book, written = keeper(Progress())
    clock.now += 5
    book.close(is_finished=True)
    clock.now += 1000
    book, more = keeper(Progress(), before=written[-1])
    clock.now += 5
    book.close()
    assert shares(more[-1]) == {"start": 10}


def test_a_step_in_flight_at_a_rollback_is_made_again(clock: Clock) -> None:
    progress = Progress()
    book, written = keeper(progress)
    for number in range(8):
        step(progress, clock, number)
        if number < 6:
            book.count(number, is_skipped=number == 5)
    progress.enter(Phase.ROLLBACK, 7)
    clock.now += 4
    book.roll_back()
    for number in range(4, 9):
        step(progress, clock, number)
        book.count(number, is_skipped=False)
    book.close()
    assert shares(written[-1]) == {"compute": 16, "data": 8, "skipped": 3, "recomputed": 12, "restart": 4}


@pytest.mark.parametrize("seconds", [[], {"compute": "1"}, {"compute": -1.0}, {"compute": None}])
def test_an_account_that_is_none_is_left_out(tmp_path: Path, seconds: Any) -> None:
    log = tmp_path / "log"
    log.mkdir()
    run = {"kind": "run", "attempt": 0, "step": None, "time": 1.0, "values": {}}
    odd = {"kind": "ledger", "attempt": 0, "step": None, "time": 1.0}
    odd["values"] = {"seconds": seconds, "steps_made": 1}
    (log / "00000000.jsonl").write_bytes(orjson.dumps(run) + b"\n" + orjson.dumps(odd) + b"\n")
    opened = open_run(tmp_path)
    assert (opened.ledger, opened.num_damaged, newest_ledger(tmp_path)) == (None, 1, None)
