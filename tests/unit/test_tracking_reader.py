"""Reading a run: one timeline over restarts and rollbacks, and what state the run is in."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from harness.errors import TrackingError
from harness.runlog.paths import log_dir
from harness.runlog.process import identity
from harness.runlog.reader import open_run
from harness.runlog.segments import segments
from harness.runlog.timeline import STALE_AFTER_S
from harness.runlog.writer import RunLog


def steps_of(log: RunLog, steps: range, value: float) -> None:
    for step in steps:
        log.write("step", {"train/loss": value}, step=step)


def test_a_metric_is_three_equally_long_arrays_in_order_of_steps(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        for step, value in ((0, 3.0), (2, math.nan), (1, -math.inf)):
            log.write("step", {"train/loss": value, "other": 1}, step=step)
    series = open_run(tmp_path).scalars("train/loss")
    assert series.steps.tolist() == [0, 1, 2]
    assert series.values.tolist()[:2] == [3.0, -math.inf]
    assert math.isnan(series.values[2])
    assert series.times.shape == (3,)


def test_the_later_value_of_a_step_holds(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        steps_of(log, range(3), 1.0)
        log.write("step", {"train/loss": 5.0}, step=1)
        log.write("step", {"other": 7.0}, step=1)
    run = open_run(tmp_path)
    assert run.scalars("train/loss").values.tolist() == [1.0, 5.0, 1.0]
    assert run.scalars("other").steps.tolist() == [1]


def test_a_rollback_replaces_the_steps_from_the_rewind_on_at_once(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    steps_of(log, range(10), 0.0)
    log.rewind(6)
    run = open_run(tmp_path)
    assert run.scalars("train/loss").steps.tolist() == [0, 1, 2, 3, 4, 5]
    steps_of(log, range(6, 8), 1.0)
    run.refresh()
    assert run.scalars("train/loss").values.tolist() == [0.0] * 6 + [1.0] * 2
    assert run.scalars("train/loss", attempt=0).values.tolist() == [0.0] * 10
    assert run.last_step == 7
    log.close()


def test_a_restart_that_rewinds_replaces_steps_from_there_on(tmp_path: Path) -> None:
    for first, value in ((0, 0.0), (4, 1.0), (2, 2.0)):
        with RunLog(tmp_path) as log:
            log.rewind(first)
            steps_of(log, range(first, first + 6), value)
    values = open_run(tmp_path).scalars("train/loss").values.tolist()
    assert values == [0.0, 0.0] + [2.0] * 6


def test_random_restarts_and_rewinds_show_what_a_plain_dictionary_would(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    truth: dict[int, float] = {}
    log, step = RunLog(tmp_path), 0
    for i in range(400):
        action = rng.random()
        if action < 0.05 and step:
            if action < 0.02:
                log.close()
                log = RunLog(tmp_path)
            step = int(rng.integers(0, step))
            log.rewind(step)
            truth = {s: v for s, v in truth.items() if s < step}
        log.write("step", {"train/loss": float(i)}, step=step)
        truth[step] = float(i)
        step += 1
    log.close()
    series = open_run(tmp_path).scalars("train/loss")
    assert dict(zip(series.steps.tolist(), series.values.tolist(), strict=True)) == truth


def test_events_of_an_abandoned_branch_are_listed_and_say_so(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        steps_of(log, range(5), 0.0)
        log.write("event", {"name": "incident", "rank": 1}, step=4)
        log.rewind(3)
        log.write("event", {"name": "rollback"}, step=3)
    run = open_run(tmp_path)
    assert [(e.name, e.step, e.abandoned) for e in run.events()] == [
        ("incident", 4, True),
        ("rollback", 3, False),
    ]
    assert run.events("incident")[0].details == {"rank": 1}


def test_reading_while_writing_sees_each_record_once(tmp_path: Path) -> None:
    log = RunLog(tmp_path, segment_bytes=700)
    run = open_run(tmp_path)
    for step in range(60):
        log.write("step", {"train/loss": 1.0}, step=step)
        run.refresh()
        assert run.scalars("train/loss").steps.tolist() == list(range(step + 1))
    assert run.refresh()
    assert run.scalars("train/loss").steps.tolist() == list(range(60))
    log.close()


def test_layers_are_a_matrix_of_steps_and_parameters(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.write("layers", {"grad_norm": {"a": 1.0, "b": 2.0}}, step=0)
        log.write("layers", {"grad_norm": {"a": 3.0, "c": math.inf}}, step=10)
    layers = open_run(tmp_path).layers("grad_norm")
    assert (layers.steps.tolist(), layers.names) == ([0, 10], ["a", "b", "c"])
    np.testing.assert_array_equal(layers.values, [[1, 2, np.nan], [3, np.nan, np.inf]])


def test_system_samples_get_the_step_of_their_moment(tmp_path: Path) -> None:
    folder = log_dir(tmp_path) / "nodes" / "a"
    with RunLog(tmp_path) as log:
        steps_of(log, range(3), 0.0)
        clock = open_run(tmp_path).scalars("train/loss").times
    folder.mkdir(parents=True)
    lines = [
        f'{{"kind":"system","attempt":0,"step":null,"time":{time},"values":{{"system/cpu":{i}}}}}\n'
        for i, time in enumerate((clock[0] - 1, (clock[1] + clock[2]) / 2, clock[2] + 1))
    ]
    (folder / "00000000.jsonl").write_text("".join(lines))
    series = open_run(tmp_path).scalars("system/cpu")
    assert (series.steps.tolist(), series.values.tolist()) == ([0, 1, 2], [0.0, 1.0, 2.0])


def test_to_pandas_has_a_row_per_step_and_a_column_per_metric(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        steps_of(log, range(3), 1.0)
        log.write("eval", {"val/loss": 2.0}, step=2)
    frame = open_run(tmp_path).to_pandas()
    assert frame.index.tolist() == [0, 1, 2]
    assert frame["train/loss"].tolist() == [1.0, 1.0, 1.0]
    assert frame["val/loss"].dropna().to_dict() == {2: 2.0}


def test_a_run_is_what_its_last_attempt_says_it_is(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    assert open_run(tmp_path).state() == "running"
    log.close("stopped")
    assert open_run(tmp_path).state() == "stopped"
    log = RunLog(tmp_path)
    run = open_run(tmp_path)
    assert run.state() == "running"
    assert run.state(now=(run.updated or 0) + STALE_AFTER_S + 1) == "stale"
    log.close()
    run.refresh()
    assert run.state() == "finished"


def test_a_run_whose_process_died_without_a_word_has_crashed(tmp_path: Path) -> None:
    program = "import os, sys; from harness.tracking import RunLog; RunLog(sys.argv[1]); os._exit(1)"
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert open_run(tmp_path).state() == "crashed"


def test_a_run_of_another_machine_is_running_until_it_is_silent_for_long(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.write("run", {**identity(), "machine": "elsewhere", "pid": os.getpid() + 1})
        run = open_run(tmp_path)
        assert run.state() == "running"
        assert run.state(now=(run.updated or 0) + STALE_AFTER_S + 1) == "stale"


def test_a_folder_without_a_log_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="is not a run"):
        open_run(tmp_path)


def test_damaged_lines_are_counted(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        steps_of(log, range(2), 0.0)
    with segments(log_dir(tmp_path))[0].open("ab") as file:
        file.write(b"not a record\n")
    assert open_run(tmp_path).num_damaged == 1


def test_a_log_of_nothing_but_its_opening_can_be_read(tmp_path: Path) -> None:
    with RunLog(tmp_path):
        run = open_run(tmp_path)
        assert (run.names(), run.last_step, run.last("train/loss")) == ([], None, None)
        assert run.to_pandas().empty
