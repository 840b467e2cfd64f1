"""What is built from the source distribution alone works in an empty folder, where no clone is."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import harness
from harness.runlog.reader import open_run
from tests.support.runs import ROOT, program, tiny

NOT_SOURCE = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "runs", "build")
COMMAND = (
    "from importlib.metadata import entry_points; exit(entry_points(name='harness')['harness'].load()())"
)
ACCELERATE = ["launch", "--num_processes=1", "--num_machines=1", "--dynamo_backend=no", "-m"]


def built(kind: str, source: Path, target: Path) -> Path:
    """The `sdist` or `wheel` of a source tree, without a network: the backend is called as pip calls it."""
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(target)], cwd=source, check=True, capture_output=True)
    [file] = target.iterdir()
    return file


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution."""
    folder = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT, folder / "clone", symlinks=True, ignore=NOT_SOURCE)
    with tarfile.open(built("sdist", folder / "clone", folder / "sdist")) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    [unpacked] = (folder / "unpacked").iterdir()
    return unpacked


@pytest.fixture(scope="module")
def site(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel: what pip leaves in `site-packages`."""
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(built("wheel", source, folder / "wheel")) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


@pytest.fixture
def empty(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory; new processes import the package from the wheel."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", str(site))
    return folder


def said(*arguments: str) -> str:
    """What the installed command `harness` prints."""
    return subprocess.check_output([sys.executable, "-c", COMMAND, *arguments], text=True)


def test_the_source_distribution_carries_tests_and_tested_versions(source: Path) -> None:
    for name in ("tests/conftest.py", "tests/architecture/options.txt", "tests/browser/actions.py"):
        assert (source / name).is_file(), name
    assert (source / "constraints.txt").read_text() == (ROOT / "constraints.txt").read_text()
    linked = re.findall(r"\]\((docs/[^)]+)\)", (source / "README.md").read_text())
    assert [name for name in linked if not (source / name).exists()] == []


def test_the_wheel_holds_the_code_and_its_data_alone(site: Path) -> None:
    assert sorted(path.name.partition("-")[0] for path in site.iterdir()) == ["harness", "stability_harness"]
    files = {path.relative_to(ROOT) for path in (ROOT / "harness").rglob("*") if path.is_file()}
    installed = {path.relative_to(site) for path in (site / "harness").rglob("*") if path.is_file()}
    assert installed == {path for path in files if path.suffix != ".pyc"}


def test_the_command_tells_its_version_and_where_it_comes_from(empty: Path, site: Path) -> None:
    assert said("--version") == f"harness {harness.__version__}\n"
    for line in said("launch").splitlines():
        assert line.split()[-1].startswith(str(site))


@pytest.mark.parametrize("name", ["slurm", "kubernetes", "kubeflow", "torchrun", "accelerate"])
def test_a_launch_file_is_printed_and_names_no_file_of_a_clone(name: str, empty: Path) -> None:
    file = said("launch", "--print", name)
    assert "harness/train.py" not in file
    if name in ("kubernetes", "kubeflow", "accelerate"):
        assert all(yaml.safe_load_all(file))
    else:
        subprocess.run(["bash", "-n"], input=file, text=True, check=True)
    if name == "torchrun":
        runs_itself = subprocess.run(
            ["bash", "-s", "--", "--config", "debug"],
            input=file.replace("exec python", "exec echo"),
            text=True,
            check=True,
            capture_output=True,
        )
        assert runs_itself.stdout.endswith("-m harness.train --config debug\n")


@pytest.mark.slow
def test_accelerate_trains_a_preset_by_its_name(empty: Path, tmp_path: Path) -> None:
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    arguments = ["--config=debug", *tiny(tmp_path, "--loop.steps=2", "--runs_dir=runs")]
    code, output = program(arguments, launcher=[accelerate, *ACCELERATE], target="harness.train", cwd=empty)
    assert code == 0, output
    assert open_run("runs/tiny").state() == "finished"
    assert sorted(path.name for path in empty.iterdir()) == ["runs"]


@contextlib.contextmanager
def started(*command: str) -> Iterator[str]:
    """The address that a server's first line tells."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ}) as process:
        try:
            assert process.stdout is not None
            [address] = re.findall(r"http://\S+", process.stdout.readline())
            yield address
        finally:
            process.terminate()


@pytest.mark.slow
def test_the_dashboard_opens_under_the_name_of_the_trackers_page(empty: Path) -> None:
    page = (ROOT / "docs" / "experiment-tracking.md").read_text()
    [command] = re.findall(r"^python (-m harness\.gradio_\w+)$", page, re.MULTILINE)
    with started(sys.executable, *command.split(), "--port", "0") as address:
        assert b"gradio" in urllib.request.urlopen(address, timeout=20).read()
