"""Metrics of any name, value, number and time: nothing that was logged is lost or takes another's place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from harness.dashboard.views import embedded_layers
from harness.runlog import digest as digests
from harness.runlog.digest import Digest
from harness.runlog.digest_cache import load_digest, save_digest
from harness.runlog.nodes import NodeLog
from harness.runlog.preview import open_whole
from harness.runlog.reader import open_run
from harness.runlog.writer import RunLog
from harness.tracking.overview import run_row, show_run, summarise
from harness.tracking.text import sparkline


@pytest.mark.parametrize("most", [8, 8192])
def test_every_sample_within_a_step_is_shown(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "MOST", most)
    node = NodeLog(tmp_path)
    with RunLog(tmp_path) as log:
        for step in range(2):
            log.write("step", {"train/loss": 1.0}, step=step)
            for number in range(20):
                node.write("system", {"system/cpu_frac": number / 20})
    digest = open_whole(tmp_path)
    bands = digest.bands("system/cpu_frac")
    assert (bands.num_points.sum(), bands.low.min(), bands.high.max()) == (40, 0.0, 0.95)
    assert set(bands.steps.tolist()) == {0, 1}
    assert (np.diff(bands.times) > 0).all()
    assert digest.bands("system/cpu_frac", max_points=1).num_points.tolist() == [40]
    assert len(open_run(tmp_path).scalars("system/cpu_frac").steps) == 40


def test_own_metrics_may_be_called_as_those_of_layers_and_ranks_are(tmp_path: Path) -> None:
    own = {"layers/attention": 0.5, "layers/grad_norm/w": 7.0, "ranks/x": 1.0, "ranks/loss/max": 8.0}
    with RunLog(tmp_path) as log:
        for step in range(3):
            log.write("step", own, step=step)
            log.write("layers", {"grad_norm": {"w": float(step)}}, step=step)
            log.write("ranks", {"loss": [1.0, 2.0]}, step=step)
    run, digest = open_run(tmp_path), open_whole(tmp_path)
    assert run.names() == digest.scalar_names() == sorted(own)
    assert {name: run.last(name) for name in own} == own
    assert {name: series.values.tolist() for name, series in run.between(0, 2).items()} == {
        name: [value] * 3 for name, value in own.items()
    }
    assert digest.bands("layers/grad_norm/w").num_points.tolist() == [1, 1, 1]
    assert digest.layers("grad_norm").values.tolist() == [[0.0], [1.0], [2.0]]
    assert digest.bands("ranks/loss/mean").high.tolist() == [1.5] * 3
    assert embedded_layers(digest, "attention", max_columns=10)["names"] == []


@pytest.mark.parametrize("kind", ["eval", "layers", "ranks"])
@pytest.mark.parametrize(("rewinds_to", "expected"), [(None, 9), (6, 6)])
def test_a_record_without_a_step_belongs_where_a_resumed_attempt_begins(
    kind: str, rewinds_to: int | None, expected: int, tmp_path: Path
) -> None:
    values = {"eval": {"x": 2.0}, "layers": {"x": {"w": 2.0}}, "ranks": {"x": [2.0]}}[kind]
    name = {"eval": "x", "layers": "layers/x/w", "ranks": "ranks/x/max"}[kind]
    with RunLog(tmp_path) as log:
        for step in range(10):
            log.write("step", {"x": 1.0}, step=step)
    digest = Digest(tmp_path)
    digest.refresh()
    with RunLog(tmp_path) as log:
        if rewinds_to is not None:
            log.rewind(rewinds_to)
        log.write(kind, values)
    digest.refresh()
    for one in (digest, open_whole(tmp_path), open_run(tmp_path)):
        bands = one.bands(name)
        assert bands.steps[bands.high == 2.0].tolist() == [expected]


@pytest.mark.parametrize("huge", [1.7e308, -1.7e308])
def test_the_mean_of_huge_and_of_tiny_values_is_between_them(huge: float, tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        for step in range(100):
            log.write("step", {"huge": huge, "both": huge * (-1) ** step, "tiny": 5e-324}, step=step)
    digest = open_whole(tmp_path)
    assert digest.bands("huge", max_points=3).mean == pytest.approx([huge] * 3, rel=1e-12)
    assert digest.bands("both", max_points=1).mean.tolist() == [0.0]
    assert digest.bands("tiny", max_points=3).mean.tolist() == [5e-324] * 3
    for values in ([huge, -huge, huge], [huge] * 9, [0.0, 5e-324], [1e-310, 3e-310, np.nan], [np.inf]):
        assert len(sparkline(np.array(values), 3)) == min(3, len(values))
    assert sparkline(np.array([huge, -huge]), 2) == ("█▁" if huge > 0 else "▁█")
    assert sparkline(np.array([0.0, 1.0, np.nan]), 3) == "▁█!"


def test_a_run_of_samples_alone_has_lasted_no_time(tmp_path: Path) -> None:
    NodeLog(tmp_path).write("system", {"system/cpu_frac": 0.5})
    (tmp_path / "log" / "00000000.jsonl").touch()
    assert summarise(open_run(tmp_path))["duration_s"] == 0.0
    assert " in 0 s" in show_run(tmp_path)


def test_the_last_step_is_exact_to_63_bits(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.write("step", {"x": 1.0}, step=2**63 - 1)
    assert open_run(tmp_path).last_step == 2**63 - 1


def test_metrics_beyond_a_number_are_left_out_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "MAX_NAMES", 100)
    with RunLog(tmp_path / "run") as log:
        for step in range(2):
            log.write("step", {f"x{number}": 1.0 for number in range(150)}, step=step)
    run = open_run(tmp_path / "run")
    assert (len(run.names()), run.num_left_out, run.last_step) == (100, 100, 1)
    assert list(run.between(0, 1)) == run.names()
    assert "left out   100 values" in show_run(tmp_path / "run")
    assert save_digest(run, tmp_path / "kept")
    kept = load_digest(tmp_path / "run", tmp_path / "kept")
    assert kept is not None
    assert kept.num_left_out == 100


def test_of_very_many_events_the_newest_and_the_incidents_are_held_and_all_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Digest, "most_events", 100)
    with RunLog(tmp_path / "run") as log:
        log.write("event", {"name": "incident"}, step=0)
        for step in range(1, 1000):
            log.write("event", {"name": "checkpoint", "file": "x" * 100}, step=step)
    digest, run = open_whole(tmp_path / "run"), open_run(tmp_path / "run")
    assert (digest.num_events, digest.num_incidents, run_row(digest).num_incidents) == (1000, 1, 1)
    assert 100 <= len(digest.events()) <= 201
    assert [event.step for event in digest.events()][:: len(digest.events()) - 1] == [0, 999]
    assert len(run.events()) == run.num_events == 1000
    assert 100 * 100 < digest.num_bytes < run.num_bytes / 4
    assert save_digest(digest, tmp_path / "kept")
    kept = load_digest(tmp_path / "run", tmp_path / "kept")
    assert kept is not None
    assert (kept.num_events, kept.events(), kept.num_bytes) == (1000, digest.events(), digest.num_bytes)
