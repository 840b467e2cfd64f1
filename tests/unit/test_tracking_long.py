"""Runs that are longer than what is held of them: whatever is asked for is as exact as of a short one."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest

from harness.runlog import blocks, codec, digest, reader
from harness.runlog.reader import Run, Series, open_run
from harness.runlog.writer import RunLog
from harness.tracking.compare import compare_runs
from harness.tracking.export import export_run
from harness.tracking.overview import summarise

NUM_RECORDS = 1500


@pytest.fixture(autouse=True)
def little_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a million steps are to 8192 entries, so are these to 64."""
    monkeypatch.setattr(digest, "MOST", 64)
    monkeypatch.setattr(digest, "READ_BYTES", 4000)
    monkeypatch.setattr(blocks, "GROW_BYTES", 2000)
    monkeypatch.setattr(reader, "STRETCH_BYTES", 8000)
    monkeypatch.setattr(reader, "COLUMNS_BYTES", 2 * NUM_RECORDS * reader.POINT_BYTES)


def make_run(run_dir: Path, *, parts_at: int | None = None) -> dict[str, dict[int, float]]:
    """Restarts, rollbacks, late values, records without a step; returns what holds in the end."""
    rng = np.random.default_rng(0)
    truth: dict[str, dict[int, float]] = {name: {} for name in ("train/loss", "val/loss", "a", "b", "late")}
    log, step = RunLog(run_dir), 0
    for number in range(NUM_RECORDS):
        action = rng.random()
        if action < 0.01 and step > 40:
            if action < 0.005:
                log.close("stopped")
                log = RunLog(run_dir)
            step -= int(rng.integers(1, 40))
            log.rewind(step)
            truth = {name: {s: v for s, v in points.items() if s < step} for name, points in truth.items()}
        loss = float(number) + (parts_at is not None and step >= parts_at)
        values = {"train/loss": math.nan if step == 700 else loss, "a": -loss, "b": 0.5}
        log.write("step", values, step=step)
        if step % 10 == 0:
            log.write("eval", {"val/loss": loss}, step=None)  # belongs to the newest step
            truth["val/loss"][step] = loss
        if step % 7 == 0:
            log.write("step", {"late": loss}, step=max(0, step - 5))
            truth["late"][max(0, step - 5)] = loss
        log.write("text", {"said": str(number)}, step=step)
        for name, value in values.items():
            truth[name][step] = value
        step += 1
    log.close()
    return truth


def points(series: Series) -> dict[int, float]:
    assert (np.diff(series.steps) > 0).all()
    return dict(zip(series.steps.tolist(), series.values.tolist(), strict=True))


def same(ours: dict[int, float], theirs: dict[int, float]) -> bool:
    np.testing.assert_array_equal(sorted(ours), sorted(theirs))
    np.testing.assert_array_equal([ours[s] for s in sorted(ours)], [theirs[s] for s in sorted(theirs)])
    return True


def test_every_step_of_a_metric_can_be_had(tmp_path: Path) -> None:
    truth = make_run(tmp_path)
    run = open_run(tmp_path)
    assert run.num_bytes < 80 * NUM_RECORDS  # they are not all held
    assert run.names() == sorted(truth)
    assert all(same(points(run.scalars(name)), truth[name]) for name in truth)
    assert run.last_step == max(truth["train/loss"])
    assert [r.values["said"] for r in run.records["text"]] == [str(n) for n in range(NUM_RECORDS)]
    assert same(run.to_pandas(["a"])["a"].to_dict(), truth["a"])


def test_steps_that_were_asked_for_once_are_kept_up_to_date(tmp_path: Path) -> None:
    truth = make_run(tmp_path)
    run = open_run(tmp_path)
    run.scalars("train/loss")
    with RunLog(tmp_path) as log:
        for step in range(500, 520):
            log.write("step", {"train/loss": 7.0}, step=step)
    run.refresh()
    assert same(points(run.scalars("train/loss")), truth["train/loss"] | dict.fromkeys(range(500, 520), 7.0))


def test_stretches_hold_every_step_once(tmp_path: Path) -> None:
    truth = make_run(tmp_path)
    run = open_run(tmp_path)
    stretches = run.stretches()
    assert len(stretches) > 5
    found: dict[str, dict[int, float]] = {name: {} for name in truth}
    for stretch in stretches:
        for name, series in run.between(*stretch).items():
            assert not found[name].keys() & points(series).keys()
            found[name] |= points(series)
    assert all(same(found[name], truth[name]) for name in truth)


def test_a_log_is_read_about_once_more_where_some_metrics_count_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("train/loss", "a")
    truth: dict[str, dict[int, float]] = {name: {} for name in (*names, "epoch/loss", "samples/loss")}
    with RunLog(tmp_path) as log:
        for step in range(3000):
            log.write("step", dict.fromkeys(names, float(step)), step=step)
            for name in names:
                truth[name][step] = float(step)
            if step % 30 == 0:
                log.write("epoch", {"epoch/loss": 0.5}, step=step // 30)
                truth["epoch/loss"][step // 30] = 0.5
            if step % 2 == 0:
                log.write("eval", {"samples/loss": 2.0}, step=64 * step)
                truth["samples/loss"][64 * step] = 2.0
            log.write("layers", {"grad_norm": {"w": 1.0}}, step=step)
    run = open_run(tmp_path)
    read: list[int] = []
    decoded = blocks.Blocks.decode
    monkeypatch.setattr(
        blocks.Blocks,
        "decode",
        lambda self, number, **how: read.append(number) or decoded(self, number, **how),
    )
    monkeypatch.setattr(blocks, "HELD_BYTES", 10_000)
    monkeypatch.setattr(reader, "STRETCH_BYTES", 20_000)
    found: dict[str, dict[int, float]] = {name: {} for name in truth}
    for stretch in run.stretches():
        largest = 0
        for name, series in run.between(*stretch).items():
            found[name] |= points(series)
            largest = max(largest, len(series.steps))
        assert largest < 1000
    assert all(same(found[name], truth[name]) for name in truth)
    assert len(run.stretches()) > 20
    assert len(read) < 6 * len(run._blocks.blocks)  # two counters, and stretches that begin within a block


def test_lines_that_hold_no_scalars_are_not_decoded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunLog(tmp_path) as log:
        for step in range(300):
            log.write("step", {"train/loss": float(step)}, step=step)
            log.write("layers", {"grad_norm": {"w": 1.0}}, step=step)
            log.write("ranks", {"loss": [1.0, 2.0]}, step=step)
            log.write("text", {"said": "a"}, step=step)
    run = open_run(tmp_path)
    lines: list[bytes] = []
    monkeypatch.setattr(blocks, "decode", lambda line: lines.append(line) or codec.decode(line))
    assert len(run.between(0, 299)["train/loss"].steps) == 300
    assert sum(b"train/loss" in line for line in lines) == 300
    assert not any(kind in line for line in lines for kind in (b"layers", b"ranks", b"text"))


def test_an_export_of_a_long_run_holds_every_point_once(tmp_path: Path) -> None:
    truth = make_run(tmp_path)
    with export_run(tmp_path).open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(map(len, truth.values()))
    found = {name: {int(r["step"]): float(r["value"]) for r in rows if r["metric"] == name} for name in truth}
    assert all(same(found[name], truth[name]) for name in truth)


def test_long_runs_are_compared_step_by_step(tmp_path: Path) -> None:
    truth = make_run(tmp_path / "a")
    other = make_run(tmp_path / "b", parts_at=900)
    partings = {each.metric: each for each in compare_runs(tmp_path / "a", tmp_path / "b").partings}
    for name in truth:
        common = sorted(truth[name].keys() & other[name].keys())
        first = next((s for s in common if truth[name][s] != other[name][s] and s != 700), None)
        assert (partings[name].step, partings[name].num_common) == (first, len(common))


def test_the_summary_of_a_long_run_counts_every_point(tmp_path: Path) -> None:
    truth = make_run(tmp_path)
    summary = summarise(open_run(tmp_path))
    losses = [value for value in truth["train/loss"].values() if math.isfinite(value)]
    assert summary["best_train/loss"] == min(losses)
    assert summary["num_nonfinite_steps"] == len(truth["train/loss"]) - len(losses)


def test_what_is_held_does_not_grow_with_the_run(tmp_path: Path) -> None:
    make_run(tmp_path)
    run = open_run(tmp_path)
    held = run.num_bytes
    with RunLog(tmp_path) as log:
        for step in range(2000, 6000):
            log.write("step", {"train/loss": 1.0, "a": 2.0, "b": 3.0}, step=step)
    longer = Run(tmp_path)
    assert longer.num_bytes < 2 * held
    for name in longer.names():
        longer.scalars(name)
    columns = sum(len(series.steps) for parts in longer._columns.values() for _, series in parts)
    assert columns * reader.POINT_BYTES <= reader.COLUMNS_BYTES + 6000 * reader.POINT_BYTES
