"""What people look at: table, overview, comparison, terminal, export, picture."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pandas
import pytest
from PIL import Image

from harness.dashboard.report import write_report
from harness.errors import TrackingError
from harness.runlog.preview import open_whole
from harness.runlog.reader import open_run
from harness.tracking import RunLog, plot_run
from harness.tracking.compare import compare_runs, compare_text, different_settings
from harness.tracking.export import export_run
from harness.tracking.overview import run_rows, runs_table, show_run, summarise
from harness.tracking.plots import draw_run
from harness.tracking.text import age, number, sparkline
from harness.tracking.watch import frame, watch_run


def make_run(run_dir: Path, *, lr: float = 0.1, num_steps: int = 30, odd: int | None = None) -> Path:
    with RunLog(run_dir, info={"config": {"optim": {"lr": lr}}}) as log:
        log.write("hparams", {"batch": 8})
        for step in range(num_steps):
            loss = math.nan if step == odd else 5.0 - 0.1 * step - (lr - 0.1) * (step >= 10)
            values = {"train/loss": loss, "train/grad_norm": 2.0, "train/grad_norm_clipped": 1.0}
            values |= {"train/lr": lr, "guard/num_nan": 7 * (step == odd), "guard/num_inf": 0}
            log.write("step", values, step=step)
            log.write("layers", {"grad_norm": {"a.weight": 1.0 + step, "b.weight": loss}}, step=step)
            log.write("ranks", {"loss": [loss, loss + 0.1], "compute_s": [0.1, 0.2]}, step=step)
            if step == odd:
                log.write("event", {"name": "incident", "parameter": "<script>b</script>"}, step=step)
        log.write("eval", {"val/loss": 2.5}, step=num_steps - 1)
    return run_dir


def test_the_summary_counts_what_happened(tmp_path: Path) -> None:
    summary = summarise(open_run(make_run(tmp_path / "a", odd=4)))
    assert summary["state"] == "finished"
    assert (summary["num_steps"], summary["num_nonfinite_steps"], summary["events"]) == (
        30,
        1,
        {"incident": 1},
    )
    assert summary["best_train/loss"] == pytest.approx(2.1)
    assert summary["last"]["val/loss"] == 2.5


def test_the_table_has_a_line_per_run_the_newest_first(tmp_path: Path) -> None:
    for name in ("first", "second"):
        make_run(tmp_path / "group" / name)
    (tmp_path / "no run").mkdir()
    assert [one.path.name for one in run_rows(tmp_path)] == ["second", "first"]
    heads, _, *rows = runs_table(tmp_path).split("\n")
    assert heads.split()[:4] == ["run", "state", "step", "loss"]
    assert [row.split()[:4] for row in rows] == [[n, "finished", "29", "2.1"] for n in ("second", "first")]


def test_an_empty_folder_and_a_missing_one(tmp_path: Path) -> None:
    assert runs_table(tmp_path).startswith("no runs")
    with pytest.raises(TrackingError, match="there is no folder"):
        runs_table(tmp_path / "gone")


def test_show_tells_metrics_events_and_settings(tmp_path: Path) -> None:
    text = show_run(make_run(tmp_path / "a", odd=4))
    for part in ("a: finished, 30 steps", "train/loss", "incident", "batch"):
        assert part in text


def test_a_comparison_finds_settings_and_the_first_step_that_differs(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", lr=0.2)
    comparison = compare_runs(a, b)
    assert comparison.settings == {"optim.lr": [0.1, 0.2]}
    assert comparison.metrics["train/loss"] == (pytest.approx(2.1), pytest.approx(2.0))
    [loss] = [p for p in comparison.partings if p.metric == "train/loss"]
    assert (loss.step, loss.num_common) == (10, 30)
    assert "they part at step 0" in compare_text(a, b)  # the learning rate


def test_any_number_of_runs_is_compared_with_the_first(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, lr=lr) for name, lr in (("a", 0.1), ("b", 0.1), ("c", 0.3))]
    text = compare_text(*runs)
    assert re.search(r"optim\.lr +0\.1 +0\.1 +0\.3", text)
    assert "a and b: equal, bit for bit, on all 30 steps" in text
    assert "a and c: they part at step 0" in text


def test_a_setting_that_is_missing_is_another_thing_than_null() -> None:
    assert different_settings([{"a": None, "b": 1}, {"b": 1}, {"a": 2, "b": 1}]) == {
        "a": ["null", "not set", 2]
    }


def test_equality_is_told_of_the_metric_with_the_most_steps(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with RunLog(make_run(tmp_path / name)) as log:
            log.write("step", {"a/rare": 1.0}, step=29)
    assert "equal, bit for bit, on all 30 steps" in compare_text(tmp_path / "a", tmp_path / "b")


def test_equal_runs_are_equal_bit_for_bit_nan_included(tmp_path: Path) -> None:
    text = compare_text(make_run(tmp_path / "a", odd=3), make_run(tmp_path / "b", odd=3))
    assert "the settings are the same" in text
    assert "equal, bit for bit, on all" in text


@pytest.mark.parametrize("format", ["csv", "parquet", "json"])
def test_an_export_holds_every_point_exactly(tmp_path: Path, format: str) -> None:
    run_dir = make_run(tmp_path / "a", odd=4)
    path = export_run(run_dir, format=format)  # type: ignore[arg-type]
    loss = open_run(run_dir).scalars("train/loss")
    if format == "json":
        metric = json.loads(path.read_text())["metrics"]["train/loss"]
        steps, values = metric["steps"], [float(value) for value in metric["values"]]
    elif format == "csv":
        with path.open() as file:
            rows = [row for row in csv.DictReader(file) if row["metric"] == "train/loss"]
        steps, values = [int(row["step"]) for row in rows], [float(row["value"]) for row in rows]
    else:
        frame = pandas.read_parquet(path)
        rows = frame[frame["metric"] == "train/loss"]
        steps, values = rows["step"].tolist(), rows["value"].tolist()
    assert steps == loss.steps.tolist()
    np.testing.assert_array_equal(values, loss.values)
    assert [p.name for p in run_dir.iterdir() if "unfinished" in p.name] == []


def test_an_export_in_an_unknown_format_or_to_nowhere_is_an_error(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "a", num_steps=1)
    with pytest.raises(TrackingError, match="'xlsx'"):
        export_run(run_dir, format="xlsx")  # type: ignore[arg-type]
    for path in (tmp_path / "gone" / "x.csv", ".", "/"):
        for write in (export_run, write_report):
            with pytest.raises(TrackingError, match="cannot be written"):
                write(run_dir, path)


def test_the_terminal_view_has_a_curve_and_the_newest_events(tmp_path: Path) -> None:
    make_run(tmp_path / "a", odd=29)
    drawn = frame(open_run(tmp_path / "a"), width=60)
    assert re.search(r"^loss +nan +█[▁▂▃▄▅▆▇█]+!$", drawn, re.M)
    assert "! incident at step 29" in drawn
    out = io.StringIO()
    watch_run(tmp_path / "a", stream=out)  # it has ended: one frame
    assert out.getvalue() == frame(open_run(tmp_path / "a"), 80) + "\n"


def test_control_characters_never_reach_the_terminal(tmp_path: Path) -> None:
    with RunLog(tmp_path / "a") as log:
        log.write("step", {"evil\x1b[2J": 1.0}, step=0)
        log.write("event", {"name": "\x1b]0;title\x07", "x": "\x1b[31m"}, step=0)
    for text in (show_run(tmp_path / "a"), frame(open_run(tmp_path / "a")), runs_table(tmp_path)):
        assert "\x1b" not in text


def test_a_run_that_logged_nothing_has_a_picture(tmp_path: Path) -> None:
    RunLog(tmp_path / "a").close()
    with Image.open(plot_run(tmp_path / "a", tmp_path / "a.png")) as picture:
        assert picture.size[0] == 1650


@pytest.mark.parametrize("values", [[-1.7e308, 1.7e308], [1.0, 1.7e308], [-1.7e308] * 3, [1e308, 5e-324]])
def test_a_run_of_huge_values_has_a_picture(values: list[float], tmp_path: Path) -> None:
    names = ("train/loss", "train/grad_norm", "train/lr", "guard/num_nan", "val/loss")
    with RunLog(tmp_path / "a") as log:
        for step, value in enumerate(values):
            log.write("step", dict.fromkeys(names, value), step=step)
    assert plot_run(tmp_path / "a", tmp_path / "a.png").stat().st_size > 1000


def test_a_run_in_a_folder_whose_name_is_no_text_can_be_looked_at(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / os.fsdecode(b"run-\xff"), num_steps=2)
    assert plot_run(run_dir, tmp_path / "a.png").exists()
    assert write_report(run_dir, tmp_path / "a.html").exists()
    assert export_run(run_dir, tmp_path / "a.json", format="json").exists()
    for text in (show_run(run_dir), compare_text(run_dir, run_dir), runs_table(tmp_path)):
        assert "run-" in text.encode().decode()


def test_the_picture_has_a_panel_for_what_was_logged_and_marks_the_events(tmp_path: Path) -> None:
    figure = draw_run(open_whole(make_run(tmp_path / "a", odd=4)))
    labels = [axis.get_ylabel() for axis in figure.axes]
    assert labels == ["loss", "gradient norm", "learning rate", "non-finite"]
    assert figure.axes[1].get_yscale() == "log"
    assert "1 incident" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_numbers_ages_and_sparklines() -> None:
    assert [number(x) for x in (None, 3.0, 0.000123456, math.nan, -math.inf, 1e9)] == [
        "-", "3", "0.00012346", "nan", "-inf", "1e+09",
    ]  # fmt: skip
    assert [age(x) for x in (42, 300, 7200, 400_000)] == ["42 s", "5 min", "2.0 h", "4.6 d"]
    assert sparkline(np.array([0.0, 7.0, math.nan]), 10) == "▁█!"
    assert sparkline(np.array([]), 10) == ""
