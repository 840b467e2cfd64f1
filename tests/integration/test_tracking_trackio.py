"""The trackio mirror, with the real package, which writes and reads back its own database."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from harness.runlog.codec import Record
from harness.tracking import RunLog, sync_run
from harness.tracking.mirror import MirroredRun, StartAgain
from harness.tracking.settings import MirrorSettings

trackio = pytest.importorskip("trackio", reason="pip install 'stability-harness[trackio]'")

from trackio import sqlite_storage  # noqa: E402
from trackio import utils as trackio_utils  # noqa: E402

from harness.tracking.trackio import TrackioMirror  # noqa: E402


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """TRACKIO_DIR, also of this process, where trackio was imported before it was set."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for module in (sqlite_storage, trackio_utils):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr(trackio_utils, "MEDIA_DIR", tmp_path / "trackio" / "media")
    return tmp_path / "trackio"


def settings(**changes: Any) -> MirrorSettings:
    return MirrorSettings(
        **{"tensorboard": False, "trackio": True, "alerts": (), "system_every_s": 0.0, **changes}
    )


def rows(run: MirroredRun) -> list[dict[str, Any]]:
    logs = sqlite_storage.SQLiteStorage.get_logs(run.settings.project, run.name, run_id=run.id)
    return sorted(logs, key=lambda row: row["step"])


def test_a_run_is_read_back_with_trackios_own_interface(tmp_path: Path, folder: Path) -> None:
    run_dir = tmp_path / "runs" / "mine"
    with RunLog(run_dir) as log:
        (run_dir / "log" / "media").mkdir()
        Image.new("RGB", (3, 2)).save(run_dir / "log" / "media" / "x.png")
        log.write("hparams", {"lr": 0.1})
        for step in range(20):
            log.write("step", {"train/loss": math.nan if step == 3 else float(step)}, step=step)
        log.rewind(15)
        log.write("step", {"train/loss": 100.0, "timestamp": 1.0}, step=15)
        log.write("event", {"name": "rollback", "reason": "loss"}, step=15)
        log.write("text", {"note": "**hello**"}, step=15)
        counted = {"counts": [1, 2], "edges": [0.0, 0.5, 1.0], "min": 0.0, "max": 1.0}
        counted |= {"num": 3, "sum": 1.5, "sum_squares": 1.0}
        log.write("histogram", {"gradients/a": counted}, step=15)
        image = {"file": "log/media/x.png", "width": 3, "height": 2, "channels": 3}
        log.write("image", {"picture": image}, step=15)
    assert sync_run(run_dir, settings(project="p", group="g")) == ["trackio"]
    assert sync_run(run_dir, settings(project="p", group="g")) == ["trackio"]  # nothing is there twice
    run = MirroredRun(run_dir, settings(project="p"))
    shown = rows(run)
    losses = [(row["step"], row["train/loss"]) for row in shown if "train/loss" in row]
    assert [step for step, _ in losses] == list(range(16))
    assert math.isnan(losses[3][1])
    assert losses[15] == (15, 100.0)
    assert any(row.get("user/timestamp") == 1.0 for row in shown)
    assert {"_type": "trackio.markdown", "_value": "**hello**"} in [row.get("note") for row in shown]
    histogram = {"_type": "trackio.histogram", "bins": [0.0, 0.5, 1.0], "values": [1, 2]}
    assert histogram in [row.get("gradients/a") for row in shown]
    [picture] = [row["picture"] for row in shown if "picture" in row]
    assert (folder / "media" / picture["file_path"]).read_bytes() == (
        run_dir / "log" / "media" / "x.png"
    ).read_bytes()
    config = sqlite_storage.SQLiteStorage.get_run_config("p", "mine", run_id=run.id)
    assert (config["lr"], config["_Group"]) == (0.1, "g")
    [told] = trackio.Api().alerts("p", run="mine")
    assert (told["title"], told["text"], told["level"], told["step"]) == (
        "rollback",
        "reason: loss",
        "info",
        15,
    )


def step(number: int) -> Record:
    return Record("step", 0, number, 1000.0 + number, {"train/loss": float(number)})


@pytest.mark.parametrize("seed", range(3))
def test_a_mirror_that_dies_at_any_moment_leaves_no_gap_and_no_duplicate(
    tmp_path: Path, folder: Path, seed: int
) -> None:
    """Each life begins at the last state that was kept, which may be older than the last commit."""
    dice, run = random.Random(seed), MirroredRun(tmp_path / "run", settings())
    first = [step(number) for number in range(20)]
    rewind = Record("rewind", 1, None, 1020.0, {"step": 12})
    second = [dataclasses.replace(step(number), attempt=1, time=1030.0 + number) for number in range(12, 30)]
    records, at, state = [*first, rewind, *second], 0, dict[str, Any]()
    while at < len(records):
        mirror = TrackioMirror(run, state)
        taken = records[at : at + dice.randrange(1, 12)]
        for record in taken:
            mirror.take(record)
        kept: Mapping[str, Any] = mirror.commit() if dice.random() < 0.8 else {}
        if kept and dice.random() < 0.6:
            state, at = json.loads(json.dumps(kept)), at + len(taken)
    assert Counter(row["step"] for row in rows(run)) == dict.fromkeys(range(30), 1)


def test_a_record_below_the_resume_point_drops_nothing(tmp_path: Path, folder: Path) -> None:
    run = MirroredRun(tmp_path / "run", settings())
    below = Record("eval", 1, 3, 1020.0, {"val/loss": 2.0})
    resumed = [dataclasses.replace(step(number), attempt=1) for number in range(20, 24)]
    mirror = TrackioMirror(run, {})
    for record in [*(step(number) for number in range(20)), below, *resumed]:
        mirror.take(record)
    mirror.commit()
    shown = rows(run)
    losses = {row["step"]: row["train/loss"] for row in shown if "train/loss" in row}
    assert losses == {number: float(number) for number in range(24)}
    assert [(row["step"], row["val/loss"]) for row in shown if "val/loss" in row] == [(3, 2.0)]


def test_samples_and_alerts_of_side_processes_come_once(tmp_path: Path, folder: Path) -> None:
    run = MirroredRun(tmp_path / "run", settings())
    for _ in range(2):
        mirror = TrackioMirror(run, {})
        mirror.take(step(0))
        mirror.take(Record("system", -1, None, 1000.5, {"system/cpu_frac": 0.5}))
        alert = {"name": "alert", "rule": "stall", "message": "no", "level": "warning"}
        mirror.take(Record("event", -1, 0, 1001.0, alert))
        mirror.commit()
    [sample] = sqlite_storage.SQLiteStorage.get_system_logs("harness", "run", run_id=run.id)
    assert sample["system/cpu_frac"] == 0.5
    [told] = trackio.Api().alerts("harness", run="run")
    assert (told["title"], told["level"]) == ("alert", "warn")


def test_a_database_that_is_gone_is_built_again(tmp_path: Path, folder: Path) -> None:
    run = MirroredRun(tmp_path / "run", settings())
    mirror = TrackioMirror(run, {})
    mirror.take(step(0))
    state = mirror.commit()
    sqlite_storage.SQLiteStorage.delete_run("harness", "run", run_id=run.id)
    with pytest.raises(StartAgain):
        TrackioMirror(run, state)


def test_it_loads_neither_torch_nor_gradio() -> None:
    program = "import sys, harness.tracking.trackio; print({'torch', 'gradio', 'pandas'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "set()"
