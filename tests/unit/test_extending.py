"""What docs/extending.md says: its examples run, and presets and commands are found wherever one starts."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

import pytest

from harness.cli.main import ENTRY_POINTS, main
from harness.config import TrainConfig, parse_arguments
from harness.config.presets import preset_file, preset_names
from harness.data import Task
from harness.errors import ConfigError
from harness.runlog.reader import open_run
from tests.support.own_tasks import own_config, points_task, run_loop
from tests.support.runs import ROOT


def test_a_preset_is_found_by_name_and_by_path_from_an_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    by_name = parse_arguments(["--config", "debug"])
    assert by_name.debug
    by_path = parse_arguments([f"--config={preset_file('debug')}"])
    assert by_name == by_path == TrainConfig.from_file("debug")
    assert parse_arguments(["--config=digits", "--seed=7"]).seed == 7


def test_a_file_of_the_working_directory_comes_before_a_preset_and_a_folder_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("digits.yaml").write_text("name: mine\n")
    Path("debug").mkdir()
    assert parse_arguments(["--config=digits.yaml"]).name == "mine"
    assert parse_arguments(["--config=digits"]).name == "digits"
    assert parse_arguments(["--config=debug"]).name == "debug"


def test_a_file_that_is_put_beside_the_presets_is_called_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "installed" / "presets"
    shutil.copytree(preset_file("debug").parent, package)
    (package / "mine.yaml").write_text("name: mine\nloop:\n  steps: 3\n")
    monkeypatch.setattr("harness.config.presets._FOLDER", package)
    monkeypatch.chdir(tmp_path)
    config = parse_arguments(["--config=mine"])
    assert (config.name, config.loop.steps) == ("mine", 3)
    assert "mine" in preset_names()
    with pytest.raises(ConfigError, match="Did you mean mine"):
        parse_arguments(["--config=minne"])


@pytest.mark.parametrize("name", ["debgu", "configs/debgu.yaml", "../debug.yml", "debug.yaml", "./debug"])
def test_an_unknown_preset_is_answered_with_those_there_are(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        parse_arguments(["--config", name])
    assert name in str(caught.value)
    assert ", ".join(preset_names()) in str(caught.value)
    assert "Did you mean debug?" in str(caught.value)


def test_every_file_beside_the_code_is_installed_with_it() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    data = setup["options.package_data"]
    shipped = [
        f"{package.replace('.', '/')}/{pattern.strip()}"
        for package, patterns in data.items()
        for pattern in patterns.split(",")
    ]
    files = [path.relative_to(ROOT) for path in (ROOT / "harness").rglob("*") if path.is_file()]
    tracked = [str(path) for path in files if path.suffix != ".pyc"]
    missing = [
        path
        for path in tracked
        if not path.endswith(".py") and not any(fnmatch(path, pattern) for pattern in shipped)
    ]
    assert missing == []
    packages = set(setup["options"]["packages"].split())
    assert {path.rpartition("/")[0].replace("/", ".") for path in tracked if path.endswith(".py")} == packages


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package on the path that adds a command, as pip would leave it."""
    (tmp_path / "greeting.py").write_text(
        "from harness.errors import DataError\n"
        "def run(argv):\n"
        "    if not argv: raise DataError('there is nobody to greet')\n"
        "    print('hello', *argv)\n"
        "    return len(argv)\n"
    )
    info = tmp_path / "greeting-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: greeting\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{ENTRY_POINTS}]\ngreet = greeting:run\ntrain = greeting:run\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("greeting", None)


def test_an_installed_package_adds_a_command(installed: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert [point.name for point in metadata.entry_points(group=ENTRY_POINTS)] == ["greet", "train"]
    assert main(["greet", "you", "there"]) == 2
    assert capsys.readouterr().out == "hello you there\n"
    assert main(["greet"]) == 2
    assert capsys.readouterr().err.startswith("DataError: there is nobody to greet")
    assert main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert re.search(r"^  greet +of greeting$", usage, re.MULTILINE)
    assert re.search(r"^  train +train a model", usage, re.MULTILINE)  # its own commands are not replaced
    assert main(["greeet"]) == 2
    assert capsys.readouterr().err.rstrip().endswith(", greet")


def points(config: TrainConfig) -> Task:
    return points_task()


def test_the_examples_of_the_page_run_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "extending.md").read_text()
    examples = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    mine = [example for example in examples if example.startswith("# mine.py\n")]
    assert len(mine) == 3
    (tmp_path / "mine.py").write_text("\n".join(mine))
    monkeypatch.chdir(tmp_path)
    arguments = [
        argument
        for line in re.findall(r"^harness train (.*)$", page, re.MULTILINE)
        for argument in shlex.split(line)
    ]
    assert [name for name in arguments if name.startswith("--")] == [
        *("--config", "--callbacks", "--guard.spike_rule", "--guard.spike_args", "--guard.checks")
    ]
    try:
        run = run_loop(own_config(tmp_path, points, *arguments[2:], "--loop.eval_every=2"))
    finally:
        sys.modules.pop("mine", None)
    assert "num_flagged" in run.guard.state_dict()["spike_rule"]
    logged = open_run(run.directory)
    assert len(logged.scalars("mine/largest_weight").values) == 1
    assert len(logged.scalars("mine/best").values) >= 1
