"""A mirror of a user's own is looked for at once: at the start of a run, and by `harness sync`."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import pytest

from harness.errors import ConfigError, TrackingError
from harness.tracking import RunLog, mirrors, sync_run
from harness.training import train
from tests.support.runs import tiny_config
from tests.support.side_process import let_it_take_its_share

MIRROR = """
from harness.tracking.mirror import Mirror

class Own(Mirror):
    def __init__(self, run, state): (run.directory / "made").touch()
    def take(self, record): pass
    def commit(self): return {}
    def close(self, end): return {}
"""


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    let_it_take_its_share(monkeypatch, mirrors)
    with RunLog(tmp_path / "run"):
        return tmp_path / "run"


def test_a_run_whose_mirror_is_not_there_writes_nothing(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    tracking = dataclasses.replace(config.tracking, mirrors=("no_such_module:Own",))
    with pytest.raises(ConfigError, match="there is no module 'no_such_module'"):
        train(dataclasses.replace(config, tracking=tracking))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("name", "trouble"),
    [
        ("no_such_module:Own", "ModuleNotFoundError"),
        ("json:Own", "class made from"),
        ("broken_mirror:Own", "ZeroDivisionError"),
    ],
)
def test_a_sync_says_at_once_that_a_mirror_cannot_be_imported(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, trouble: str
) -> None:
    (tmp_path / "broken_mirror.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    began = time.monotonic()
    with pytest.raises(TrackingError, match=trouble):
        sync_run(run_dir, mirrors=[name], timeout_s=50)
    assert time.monotonic() - began < 40


def test_a_mirror_in_the_current_directory_is_found(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mirror_that_stands_here.py").write_text(MIRROR)
    monkeypatch.chdir(tmp_path)
    assert sync_run(run_dir, mirrors=["mirror_that_stands_here:Own"]) == ["mirror_that_stands_here:Own"]
    assert (run_dir / "made").exists()
