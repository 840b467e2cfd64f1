"""The report as a file: what is inside, how large it gets, what it needs. `tests/browser` looks at it."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from harness.dashboard import report as reports
from harness.dashboard.bundle import ASSETS, bundled
from harness.dashboard.report import write_report
from harness.errors import TrackingError
from harness.runlog import digest as digests
from harness.tracking import RunLog
from tests.support.runs import ROOT


class Parts(HTMLParser):
    """The page's elements that would load or run something, and its embedded data."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.scripts: list[str] = []
        self.policy = ""
        self._is_script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.loads += [f"{tag} {name}" for name in given if name in ("src", "href", "srcset", "style")]
        self.policy = (given.get("content") or "") if "http-equiv" in given else self.policy
        self._is_script = tag == "script"

    def handle_data(self, data: str) -> None:
        if self._is_script:
            self.scripts.append(data)
            self._is_script = False


def embedded(run_dir: Path) -> dict[str, Any]:
    """What the report of a run holds."""
    parts = Parts()
    parts.feed(write_report(run_dir).read_text(encoding="utf-8"))
    told: dict[str, Any] = json.loads(parts.scripts[0], parse_constant=pytest.fail)
    return told


def test_it_is_one_file_that_loads_nothing_and_whose_data_are_no_html(tmp_path: Path) -> None:
    odd = "</script><!--<script>\u2028\u2029]]>&amp;"
    run_dir = tmp_path / "<b>a & b"
    with RunLog(run_dir, info={"config": {"optim": {"lr": odd}}}) as log:
        log.write("step", {odd: 1.0, "constructor": 2.0, "__proto__": 3.0}, step=0)
        log.write("event", {"name": "incident", "summary": odd}, step=0)
    parts = Parts()
    page = write_report(run_dir).read_text(encoding="utf-8")
    parts.feed(page)
    assert parts.loads == []
    assert page.count("<script") == page.count("</script>") == len(parts.scripts) == 2
    assert page.count("<!--") == 0
    assert parts.policy.startswith("default-src 'none';")
    told = json.loads(parts.scripts[0])
    assert told["run"] == "<b>a & b"
    assert set(told["curves"]["curves"]) == {odd, "constructor", "__proto__"}
    assert told["view"]["incidents"][0]["summary"] == odd
    assert [name for name, _ in told["settings"]] == ["optim.lr"]


def test_curves_are_bands_that_hide_no_spike_on_every_axis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "MOST", 256)
    monkeypatch.setattr(reports, "MAX_POINTS", 100)
    with RunLog(tmp_path / "a") as log:
        for step in range(3000):
            loss = {1777: 1e6, 1778: math.nan}.get(step, 1.0)
            log.write("step", {"train/loss": loss, "train/tokens": 10 * step}, step=step)
            log.write("layers", {"grad_norm": {"w": loss}}, step=step)
    told = embedded(tmp_path / "a")
    loss = told["curves"]["curves"]["train/loss"]
    place = told["curves"]["xs"][loss["x"]]
    assert len(loss["mean"]) == len(loss["high"]) == len(place["steps"]) <= 100
    assert {axis: len(values) for axis, values in place.items()} == dict.fromkeys(
        ("step", "tokens", "hours", "clock", "steps"), len(place["steps"])
    )
    assert max(loss["high"]) == 1e6
    assert [counts for _, *counts in loss["nonfinite"]] == [[1, 0]]
    layers = told["layers"]["grad_norm"]
    assert layers["names"] == ["w"]
    assert len(layers["values"][0]) == len(told["curves"]["xs"][layers["x"]]["steps"])
    assert len(layers["nonfinite"][0]) == 1


def test_its_size_is_bounded_however_much_was_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "TOTAL_POINTS", 4000)
    monkeypatch.setattr(reports, "TOTAL_CELLS", 4000)
    with RunLog(tmp_path / "a") as log:
        for step in range(200):
            log.write("step", {f"metric/{number}": step / 3 for number in range(50)}, step=step)
            rows = {f"layer{number}": step / 3 for number in range(50)}
            log.write("layers", {"grad_norm": rows, "grad_max": rows}, step=step)
    told = embedded(tmp_path / "a")
    assert sum(len(curve["mean"]) for curve in told["curves"]["curves"].values()) <= 4000
    assert sum(len(row) for layers in told["layers"].values() for row in layers["values"]) <= 4000


def test_heat_maps_are_bounded_where_every_parameter_is_logged_at_steps_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports, "TOTAL_CELLS", 4000)
    with RunLog(tmp_path / "a") as log:
        for step in range(3000):
            value = {1777: 1e6, 1778: math.nan}.get(step, 1.0)
            log.write("layers", {"grad_norm": {f"layer{step % 50}": value}}, step=step)
    layers = embedded(tmp_path / "a")["layers"]["grad_norm"]
    assert len(layers["names"]) == 50
    assert sum(len(row) for row in layers["values"]) <= 4000
    assert {len(row) for row in layers["values"]} == {len(layers["steps"])}
    rows = dict(zip(layers["names"], zip(layers["values"], layers["nonfinite"], strict=True), strict=True))
    assert max(value for value in rows["layer27"][0] if value is not None) == 1e6
    assert len(rows["layer28"][1]) == 1


def test_text_of_many_different_characters_takes_no_longer_than_other_text() -> None:
    def seconds(text: str) -> float:
        began = time.perf_counter()
        assert json.loads(reports._inside_script({"text": text})) == {"text": text}
        return time.perf_counter() - began

    private = "".join(map(chr, range(0xF0000, 0xF0000 + 20_000)))
    alike = "\U000f0000" * len(private)
    assert seconds(private) < 20 * max(0.02, seconds(alike))


def test_the_loss_is_in_it_however_many_metrics_come_first_by_name(tmp_path: Path) -> None:
    with RunLog(tmp_path / "a") as log:
        own = {f"expert/{number}": 1.0 for number in range(reports.MAX_CURVES)}
        log.write("step", {**own, "train/loss": 2.0}, step=0)
    curves = embedded(tmp_path / "a")["curves"]["curves"]
    assert curves["train/loss"]["mean"] == [2.0]
    assert len(curves) == reports.MAX_CURVES


def test_a_run_that_logged_nothing_has_a_report_and_a_missing_one_is_an_error(tmp_path: Path) -> None:
    RunLog(tmp_path / "a").close()
    assert embedded(tmp_path / "a")["view"]["state"] == "finished"
    with pytest.raises(TrackingError, match="is not a run"):
        write_report(tmp_path / "gone")
    with pytest.raises(TrackingError, match="cannot be written"):
        write_report(tmp_path / "a", tmp_path / "gone" / "report.html")


def test_it_is_written_without_a_server_or_a_drawing_library(tmp_path: Path) -> None:
    RunLog(tmp_path / "a").close()
    program = "import sys; from harness.dashboard.report import write_report; write_report(sys.argv[1]); "
    program += "print({'torch', 'gradio', 'fastapi', 'uvicorn', 'matplotlib'} & set(sys.modules))"
    said = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "a")],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    assert said.stdout.strip() == "set()"


def test_the_bundle_holds_each_module_once_and_no_statement_that_a_file_cannot_run() -> None:
    script = bundled("report", instead={"api": "embedded"})
    assert not re.search(r"^\s*(import|export)\b", script, re.M)
    assert "fetch(" not in script
    assert "</" not in script
    for name in ("api", "chart", "format", "heatmap", "monitor", "page", "report"):
        assert script.count(f"modules.{name} = ") == 1
    assert {path.stem for path in ASSETS.glob("*.js")} >= {"embedded", "compare"}
