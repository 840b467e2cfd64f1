"""What the page is told is plain data: numbers as numbers, whatever the run and the axis."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from harness.dashboard import comparison
from harness.dashboard.comparison import compare_view
from harness.dashboard.run_index import RunIndex
from harness.dashboard.views import MAX_EVENTS, MAX_NAMES, Axis, curves_view, layers_view, run_view
from harness.runlog import digest as digests
from harness.runlog.digest import Digest
from harness.runlog.nodes import NodeLog
from harness.runlog.paths import HEALTHY, MANIFEST, checkpoints_dir
from harness.tracking import RunLog
from harness.tracking.compare import Comparison, compare_runs

server = pytest.importorskip("harness.dashboard.server", reason="pip install 'stability-harness[dashboard]'")
from starlette.testclient import TestClient  # noqa: E402


@pytest.fixture(params=[8, 8192], ids=["reduced", "whole"])
def digest(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Digest:
    """Of 40 steps, with values that are not finite; long enough to be reduced, or not."""
    monkeypatch.setattr(digests, "MOST", request.param)
    with RunLog(tmp_path, info={"config": {"loop": {"steps": 40}}}) as log:
        for step in range(40):
            odd = {7: math.nan, 8: math.inf}.get(step, float(step))
            log.write("step", {"train/loss": odd, "train/tokens": 100 * (step + 1)}, step=step)
            log.write("layers", {"grad_norm": {"w": odd, "b": 1.0}}, step=step)
            log.write("ranks", {"loss": [1.0, odd]}, step=step)
        log.write("eval", {"val/loss": 2.0}, step=20)
        log.write("eval", {"val/loss": 3.0}, step=39)
        log.write("event", {"name": "rollback"}, step=6)
        for _ in range(MAX_EVENTS):
            log.write("event", {"name": "checkpoint"}, step=6)
        log.write("event", {"name": "incident", "loss": math.nan, "samples": [1, 2]}, step=7)
    return read(tmp_path)


def read(run_dir: Path) -> Digest:
    one = Digest(run_dir)
    one.refresh()
    return one


def told(answer: Any) -> Any:
    """As the browser gets it, where NaN and infinities are null."""
    return json.loads(bytes(server._json(answer).body), parse_constant=pytest.fail)


@pytest.mark.parametrize("axis", get_args(Axis))
@pytest.mark.parametrize("within", [None, (5, 20)])
def test_curves_are_numbers_on_every_axis(axis: Axis, within: tuple[int, int] | None, digest: Digest) -> None:
    names = ["train/loss", "layers/grad_norm/w", "ranks/loss/max", "nothing"]
    view = told(curves_view(digest, names, axis=axis, within=within, max_points=10))
    for name in names[:-1]:
        curve = view["curves"][name]
        place = view["xs"][curve["x"]]
        assert len(place["x"]) == len(place["steps"]) == len(curve["mean"]) <= 10
        assert all(isinstance(x, (int, float)) for x in place["x"] + place["steps"])
        assert place["x"] == sorted(place["x"])
        assert sum(count for _, *counts in curve["nonfinite"] for count in counts) == 2
    expected = {"step": (within or (0, 39))[0], "tokens": 100 * ((within or (0, 39))[0] + 1)}
    assert view["xs"][0]["x"][0] == pytest.approx(expected.get(axis, view["xs"][0]["x"][0]), rel=0.2, abs=2)
    assert view["curves"]["nothing"]["mean"] == []


def test_layers_and_the_run_are_numbers_and_words(digest: Digest) -> None:
    layers = told(layers_view(digest, "grad_norm"))
    assert (layers["names"], layers["steps"][-1], layers["values"][0][-1]) == (["w", "b"], 39, 39.0)
    assert layers["nonfinite"] == [[7, 8], []]
    run = told(run_view(digest))
    assert (run["state"], run["last_step"], run["total_steps"]) == ("finished", 39, 40)
    assert run["last"]["train/loss"] == 39.0
    assert run["ranks"] == {"loss": [1.0, 39.0]}
    assert run["incidents"][0]["samples"] == [1, 2]
    assert run["best_val_loss"] == 2.0
    assert run["nonfinite_steps"] == {"num": 2, "is_exact": True}


def test_checkpoints_push_nothing_else_out_of_the_events(digest: Digest) -> None:
    run = run_view(digest)
    assert [event["name"] for event in run["events"]] == ["rollback", "incident"]
    assert run["event_counts"] == {"rollback": 1, "incident": 1, "checkpoint": MAX_EVENTS}


def test_a_step_committed_again_after_a_rollback_shows_the_health_of_its_newest_folder(
    tmp_path: Path,
) -> None:
    with RunLog(tmp_path) as log:
        for num_steps in (50, 100, 100):
            log.write("event", {"name": "checkpoint", "num_steps": num_steps}, step=num_steps - 1)
    for name, *files in (("step-00000100", MANIFEST), ("step-00000100.1", MANIFEST, HEALTHY)):
        folder = checkpoints_dir(tmp_path) / name
        folder.mkdir(parents=True)
        for file in files:
            (folder / file).touch()
    shown = {one["num_steps"]: one["health"] for one in told(run_view(read(tmp_path)))["checkpoints"]}
    assert shown == {50: "deleted", 100: "healthy"}


def test_numbers_of_the_trainer_are_there_however_many_others_were_logged(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        for statistic in ("a", "b", "c", "d"):
            log.write("layers", {statistic: {f"layer{number}": 1.0 for number in range(1250)}}, step=0)
        own = {f"expert/{number}": 1.0 for number in range(MAX_NAMES)}
        log.write("step", {**own, "train/loss": 2.0, "val/loss": 3.0}, step=0)
        log.write("ranks", {"loss": [1.0, 2.0]}, step=0)
    run = told(run_view(read(tmp_path)))
    assert (run["last"]["train/loss"], run["last"]["val/loss"], run["last"]["ranks/loss/max"]) == (
        2.0,
        3.0,
        2.0,
    )
    assert {"train/loss", "val/loss"} < set(run["names"])
    assert len(run["names"]) == MAX_NAMES


def test_the_page_is_told_of_samples_of_nodes_while_no_step_is_logged(tmp_path: Path) -> None:
    app = server.FastAPI()
    server._add_data(app, RunIndex(tmp_path))
    client = TestClient(app)
    name = "system/cpu_frac"

    def answer(seen: str) -> Any:
        return client.get("/api/run", params={"run": "a", "name": name, "seen": seen}).json()

    with RunLog(tmp_path / "a") as log:
        log.write("step", {"train/loss": 1.0}, step=0)
        first = answer("")
        assert answer(first["version"])["unchanged"]
        NodeLog(tmp_path / "a").write("system", {name: 0.5})
        assert answer(first["version"])["curves"]["curves"][name]["mean"] == [0.5]


def test_last_values_that_are_not_finite_are_spelled_out(tmp_path: Path) -> None:
    values = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": None, "e": 1.5}
    with RunLog(tmp_path / "runs" / "a") as log:
        log.write("step", {name: value for name, value in values.items() if value is not None}, step=0)
        log.write("ranks", {"loss": [math.nan, 1.0]}, step=0)
        log.write("event", {"name": "incident", "loss": math.nan, "norms": [math.inf, 1.0]}, step=0)
    run = told(run_view(read(tmp_path / "runs" / "a")))
    assert [run["last"][name] for name in "abce"] == ["nan", "inf", "-inf", 1.5]
    assert run["ranks"] == {"loss": ["nan", 1.0]}
    assert (run["incidents"][0]["loss"], run["incidents"][0]["norms"]) == ("nan", ["inf", 1.0])
    compared = told(compare_view(RunIndex(tmp_path / "runs"), ["a", "a"]))
    assert {row["name"]: row["values"][0] for row in compared["metrics"]} == {
        "a": "nan", "b": "inf", "c": "-inf", "e": 1.5,
    }  # fmt: skip


def write_one_step(run_dir: Path) -> None:
    with RunLog(run_dir) as log:
        log.write("step", {"train/loss": 1.0}, step=0)
        log.end("finished")


def test_of_a_run_that_was_deleted_the_comparison_says_that_it_is_gone(tmp_path: Path) -> None:
    for name in "abc":
        write_one_step(tmp_path / "runs" / name)
    run_index = RunIndex(tmp_path / "runs", search_every_s=0.0)
    assert run_index.names()
    shutil.rmtree(tmp_path / "runs" / "b")
    compared = told(compare_view(run_index, ["a", "b", "c"]))
    assert compared["states"] == ["finished", "gone", "finished"]
    assert "there is no run 'b'" in compared["partings"][0]["error"]
    assert compared["partings"][1]["num_common"] == 1


def test_where_runs_part_is_read_again_only_when_a_log_has_grown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[str] = []

    def counted(first: Path, second: Path, *, within: Path | None) -> Comparison:
        compared.append(second.name)
        return compare_runs(first, second, within=within)

    monkeypatch.setattr(comparison, "compare_runs", counted)
    run_index = RunIndex(tmp_path / "runs")
    for name in "abc":
        write_one_step(tmp_path / "runs" / name)
    compare_view(run_index, ["a", "b", "c"])
    compare_view(run_index, ["a", "b", "c"])
    assert compared == ["b", "c"]
    write_one_step(tmp_path / "runs" / "c")
    compare_view(run_index, ["a", "b", "c"])
    assert compared == ["b", "c", "c"]


@pytest.mark.parametrize("most", [16, 8192])
def test_steps_with_nan_or_inf_are_never_overstated(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where points of the loss and of the gradients stand for other steps."""
    monkeypatch.setattr(digests, "MOST", most)
    monkeypatch.setattr(digests, "CLOSE_BYTES", 0)  # as if the log were long
    rng = np.random.default_rng(0)
    odd = set(rng.choice(200, size=12, replace=False).tolist())
    with RunLog(tmp_path) as log:
        for step in range(200):
            is_odd = step in odd
            log.write("step", {"train/loss": math.nan if is_odd else 1.0}, step=step)
            if step % 3 or is_odd:  # so that their points begin elsewhere
                log.write("step", {"guard/num_nan": 5 * is_odd}, step=step)
            if step % 5 or is_odd:
                log.write("step", {"guard/num_inf": 5 * is_odd}, step=step)
    told_of = run_view(read(tmp_path))["nonfinite_steps"]
    assert told_of == {"num": len(odd), "is_exact": most > 200}
