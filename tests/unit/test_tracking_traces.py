"""What is held of a metric: bounded however a run goes on, ends and begins again."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from harness.runlog import digest as digests
from harness.runlog.digest import Digest
from harness.runlog.reader import open_run
from harness.runlog.series import Series
from harness.runlog.traces import TOTAL_SCALE, Trace, entries_of
from harness.runlog.writer import RunLog


def points(steps: range, value: float, attempt: int) -> np.ndarray:
    numbers = np.array(steps, dtype=np.int64)
    series = Series(numbers, np.full(len(numbers), value), numbers.astype(np.float64))
    return entries_of(series, attempt=attempt, block=0)


def test_more_attempts_than_entries_end_and_leave_the_long_ones_their_entries() -> None:
    trace = Trace(most=32)
    for attempt in range(100):
        trace.add(points(range(1), 1.0, attempt))
    trace.add(points(range(1000), 2.0, 100))
    assert len(trace.entries) <= 32 + 101 + trace.width
    assert trace.num_points == 1100
    assert (trace.entries["attempt"] == 100).sum() > 16


@pytest.mark.parametrize("is_live", [False, True])
def test_a_run_of_many_rollbacks_can_be_read(
    is_live: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "MOST", 64)
    digest = Digest(tmp_path)
    with RunLog(tmp_path) as log:
        for number in range(300):
            log.write("step", {"loss": float(number)}, step=0)
            log.rewind(0)
            if is_live and number % 7 == 0:
                digest.refresh()
    digest.refresh()
    assert open_run(tmp_path).attempts == digest.attempts == list(range(301))
    assert digest.bands("loss").steps.tolist() == []
    with RunLog(tmp_path) as log:
        for step in range(500):
            log.write("step", {"loss": 1.0}, step=step)
    digest.refresh()
    assert digest.bands("loss", max_points=1).num_points.tolist() == [500]


@pytest.mark.parametrize("at_once", [1, 7, 10_000])
def test_a_long_metric_counts_a_step_that_was_written_twice_once(at_once: int) -> None:
    trace = Trace(most=32)
    twice = np.concatenate([points(range(s, s + 1), value, 0) for s in range(600) for value in (0.0, 10.0)])
    for begin in range(0, len(twice), at_once):
        trace.add(twice[begin : begin + at_once])
    assert trace.width > 1
    assert trace.num_points == 600
    assert (trace.entries["low"].min(), trace.entries["total"].sum() / TOTAL_SCALE) == (10.0, 6000.0)


def test_a_metric_that_was_logged_once_is_small() -> None:
    one = points(range(1), 1.0, 0)
    tracemalloc.start()
    traces = [Trace() for _ in range(1000)]
    for trace in traces:
        trace.add(one)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used < sum(trace.num_bytes for trace in traces) < 2_000_000
