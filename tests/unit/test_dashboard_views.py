"""What the page is told is plain data: numbers as numbers, whatever the run and the axis."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest

from harness.dashboard.views import MAX_EVENTS, Axis, curves_view, layers_view, run_view
from harness.runlog import digest as digests
from harness.runlog.digest import Digest
from harness.tracking import RunLog

server = pytest.importorskip("harness.dashboard.server", reason="pip install 'stability-harness[dashboard]'")


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
    one = Digest(tmp_path)
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
    assert run["nonfinite_steps"]["num"] == 2


def test_checkpoints_push_nothing_else_out_of_the_events(digest: Digest) -> None:
    run = run_view(digest)
    assert [event["name"] for event in run["events"]] == ["rollback", "incident"]
    assert run["event_counts"] == {"rollback": 1, "incident": 1, "checkpoint": MAX_EVENTS}
