"""Settings of a tracker are checked before anything is written, and come back from where they were saved."""

from __future__ import annotations

import json
import queue
from pathlib import Path
from typing import Any

import pytest

from harness import ExperimentTracker
from harness.errors import ConfigError, TrackingError
from harness.tracking import ExperimentConfig, open_run
from tests.support.trackers import alone

WRONG: list[tuple[str, Any]] = [
    ("tags", "a,b"), ("tags", [1]), ("tags", None), ("enable_wandb", "false"), ("enable_tensorboard", 1),
    ("log_interval", -1), ("save_interval", 2.5), ("log_interval", "10"), ("log_interval", True),
    ("experiment_name", None), ("run_name", 3), ("notes", "\ud800"), ("tensorboard_dir", ""),
    ("resume_run", "yes"), ("model_save_dir", None),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_setting_is_an_error_that_names_it_and_nothing_is_written(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        ExperimentConfig(**{name: value})
    config = ExperimentConfig()
    setattr(config, name, value)
    with pytest.raises(ConfigError, match=name):
        ExperimentTracker(config)
    Path("c.json").write_text(json.dumps({name: value}))
    with pytest.raises(ConfigError, match=name):
        ExperimentConfig.from_file("c.json")
    assert [path.name for path in Path().iterdir()] == ["c.json"]


def test_what_is_no_configuration_is_an_error_too() -> None:
    with pytest.raises(ConfigError, match="ExperimentConfig"):
        ExperimentTracker({"experiment_name": "a"})  # type: ignore[arg-type]


def test_paths_and_other_collections_of_tags_are_welcome() -> None:
    config = ExperimentConfig(tensorboard_dir=Path("a/b"), tags=("x", "y"))  # type: ignore[arg-type]
    assert (config.tensorboard_dir, config.tags) == ("a/b", ["x", "y"])


@pytest.mark.parametrize("name", ["final.json", "final.yaml", "./here.json", "deep/er/c.yml"])
def test_a_configuration_is_read_where_it_was_saved(name: str, tmp_path: Path) -> None:
    with alone(tmp_path, notes="üben\ttab", tags=["a"]) as tracker:
        tracker.config.config_save_dir = "configs"
        tracker.save_config(name)
        assert ExperimentConfig.from_file(name) == tracker.config


def test_in_a_checkout_no_configuration_is_saved_among_the_presets(tmp_path: Path) -> None:
    """`configs` is a link to them there, and a file in them would be a preset from then on."""
    presets = tmp_path / "harness" / "presets"
    presets.mkdir(parents=True)
    Path("configs").symlink_to(presets)
    with alone(tmp_path) as tracker:
        tracker.config.config_save_dir = "configs"
        assert tracker.save_config("mine.yaml") == Path("my-configs/mine.yaml")
        assert ExperimentConfig.from_file("mine.yaml") == tracker.config
    assert list(presets.iterdir()) == []


def test_a_bare_name_that_means_two_different_files_is_an_error(tmp_path: Path) -> None:
    ExperimentConfig(notes="here").save("c.json")
    assert ExperimentConfig.from_file("c.json").notes == "here"
    ExperimentConfig(notes="saved").save("configs/c.json")
    with pytest.raises(TrackingError, match="is here and in configs"):
        ExperimentConfig.from_file("c.json")
    assert ExperimentConfig.from_file("configs/c.json").notes == "saved"
    assert ExperimentConfig.from_file(tmp_path / "c.json").notes == "here"


def test_json_with_tabs_is_read() -> None:
    Path("c.json").write_text('{\n\t"notes": "a"\n}')
    assert ExperimentConfig.from_file("c.json").notes == "a"


def test_the_queue_takes_what_a_queue_takes(tmp_path: Path) -> None:
    with alone(tmp_path) as tracker:
        put = tracker.metrics_queue
        put.put({"loss": 1.0})
        put.put({"loss": 2.0}, False)
        put.put({"loss": 3.0}, block=True, timeout=1.0)
        put.put_nowait({"loss": 4.0})
        put.put(item={"loss": 5.0}, block=False)
        put.task_done()
        put.join()
        assert (put.qsize(), put.empty(), put.full()) == (0, True, False)
        assert {name for name in dir(put) if not name.startswith("_")} <= set(dir(queue.Queue))
    assert open_run(tracker.run_dir).scalars("train/loss").values.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
