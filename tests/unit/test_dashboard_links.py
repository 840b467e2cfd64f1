"""Nothing from outside the folder of runs goes over HTTP: not through a link, a name, or TensorBoard."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the dashboard needs `pip install 'stability-harness[dashboard]'`")

from starlette.testclient import TestClient

from harness.dashboard import programs
from harness.dashboard.forks import fork
from harness.dashboard.run_index import RunIndex
from harness.dashboard.tensorboard import TensorBoard
from harness.errors import ConfigError, TrackingError
from harness.runlog import segments
from tests.support.damage import sound_run
from tests.support.readers import Readers

CANARY = "canary"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with the run `mine`; outside of it, a run in which everything says `canary`."""
    runs = tmp_path / "runs"
    sound_run(runs / "mine")
    outside = sound_run(tmp_path / "outside" / CANARY)
    for path in [*outside.rglob("*.jsonl"), outside / "config.yaml"]:
        path.write_text(path.read_text().replace("train/loss", CANARY).replace("quickstart", CANARY))
    with (outside / "log" / "00000000.jsonl").open("a") as file:
        values = {"loss": CANARY, "host": CANARY, CANARY: 1}
        for kind in ("hparams", "event", "run", "step"):
            record = {"kind": kind, "attempt": 0, "step": None, "time": 1.7e9, "values": values}
            file.write(json.dumps(record) + "\n")
    (outside / "config.yaml").write_text(f"name: {CANARY}\n{CANARY}: {CANARY}\n")
    (outside / "checkpoints" / "step-31415926").mkdir()
    (outside / "checkpoints" / "step-31415926" / "manifest.json").write_text(CANARY)
    for path in (outside / "incidents" / "step-00000007").iterdir():
        path.write_text(path.read_text().replace("NaN", CANARY))
    (tmp_path / "outside" / "output.log").write_text(f"{CANARY}\n")
    return runs


LINKED = [
    "mine/config.yaml",
    "mine/log",
    "mine/log/00000000.jsonl",
    "mine/log/nodes",
    "mine/checkpoints",
    "mine/checkpoints/step-00000008",
    "mine/incidents",
    "mine/incidents/step-00000007",
    "mine/incidents/step-00000007/story.md",
    "mine/incidents/step-00000007/incident.json",
    "mine",
    ".dashboard/mine/output.log",
    ".dashboard/mine",
    ".dashboard",
]


def link(root: Path, name: str) -> None:
    """Puts a link to the like outside in the place of a file or folder."""
    path, outside = root / name, root.parent / "outside"
    parts = Path(name).parts
    if parts[0] == ".dashboard":
        target = {3: outside / "output.log", 2: outside, 1: outside}[len(parts)]
        if len(parts) == 1:
            (outside / "mine").mkdir()
            (outside / "output.log").rename(outside / "mine" / "output.log")
    else:
        target = outside / CANARY / Path(*parts[1:])
        if "checkpoints/step-" in name:
            target = target.with_name("step-31415926")
    assert target.exists(), target
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(target)


@pytest.mark.parametrize("is_relative", [False, True])
@pytest.mark.parametrize("name", LINKED)
def test_no_link_is_read_over_http(name: str, is_relative: bool, root: Path) -> None:
    sound_run(root / "other")
    link(root, name)
    if is_relative:
        target = os.path.relpath(os.readlink(root / name), (root / name).parent)
        (root / name).unlink()
        (root / name).symlink_to(target)
    readers = Readers(root)
    rows = readers.table()
    assert CANARY not in json.dumps(rows)
    assert "other" in rows
    for question in [*readers.questions("mine", "other", root.parent), *readers.folder_questions()]:
        if question.name.startswith("/api"):
            answer = question.ask()
            assert answer.status in (200, 404)
            text = answer.text.replace(str(root), "")
            assert CANARY not in text, question.name
            assert "31415926" not in text, question.name


def test_what_changes_runs_reads_nothing_through_links_either(root: Path) -> None:
    link(root, "mine/config.yaml")
    with pytest.raises(ConfigError) as refused:
        programs.resume(root / "mine")
    assert CANARY not in str(refused.value)


def test_a_folder_of_runs_may_itself_be_a_link(root: Path) -> None:
    (root.parent / "elsewhere").symlink_to(root)
    assert set(Readers(root.parent / "elsewhere").table()) == {"mine"}


NAMES = [
    "../outside/canary",
    "mine/../../outside/canary",
    "/etc",
    "/",
    "",
    ".",
    "..",
    "mine\0",
    "\0",
    "mine/",
    "mine/log",
    ".dashboard/mine",
    "x" * 5000,
    "a/" * 3000,
    "~",
    "file:///etc/passwd",
    "..%2foutside%2fcanary",
    "%2e%2e/outside",
    "..\\outside",
    "mine\n",
    "\ud800",
    "<script>alert(1)</script>",
]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_name_that_is_none_of_a_run_is_refused_in_words(name: str, root: Path) -> None:
    client: TestClient = Readers(root)._client
    spelled = name.encode(errors="surrogatepass")
    quoted = "".join(f"%{byte:02x}" for byte in spelled)
    for path in ("run", "settings", "curves", "output", "story"):
        answer = client.get(f"/api/{path}?run={quoted}" + "&step=7" * (path == "story"))
        is_own = path == "output" and name.startswith("mine")  # another spelling of a run that there is
        assert answer.status_code in (404, 422) or is_own or answer.json() == {"text": "", "offset": 0}
        assert CANARY not in answer.text.replace(name, "").replace(name.encode("unicode_escape").decode(), "")
    compared = client.get(f"/api/compare?run={quoted}&run=mine")
    assert compared.json()["states"] == ["gone", "finished"]
    assert CANARY not in compared.text.replace(name, "").replace(name.encode("unicode_escape").decode(), "")


def _link_the_folder(folder: Path, outside: Path) -> None:
    folder.symlink_to(outside)


def _link_a_file(folder: Path, outside: Path) -> None:
    (folder / "deeper").mkdir(parents=True)
    (folder / "deeper" / "events.out.tfevents.1").symlink_to(outside / "output.log")


def _pipe(folder: Path, outside: Path) -> None:
    folder.mkdir()
    os.mkfifo(folder / "events.out.tfevents.1")


@pytest.mark.parametrize("make", [_link_the_folder, _link_a_file, _pipe])
def test_tensorboard_is_not_started_where_it_would_read_elsewhere(
    make: Callable[[Path, Path], None], root: Path
) -> None:
    sound_run(root / "other")
    (root / "other" / "tensorboard").mkdir()
    make(root / "mine" / "tensorboard", root.parent / "outside")
    tensorboard = TensorBoard()
    with pytest.raises(TrackingError, match="is a link, or no regular file"):
        tensorboard.show({"mine": root / "mine", "other": root / "other"})
    assert tensorboard.runs == ()
    tensorboard.stop()


def test_runs_of_odd_names_stand_in_the_table_beside_the_others(root: Path) -> None:
    names = [
        b"\xff\xfe",
        rb"\xff\xfe",
        b"\xff\\xfe",
        rb"\\xff\xfe",
        rb"back\slash",
        b"line\nbreak",
        "\u202etxt".encode(),
        b"\x1b[2J",
        b"<img src=x>",
        b"a'b\"c",
        b"$x_{",
    ]
    for name in names:
        shutil.copytree(root / "mine", root / os.fsdecode(name))
    readers = Readers(root)
    rows = readers.table()
    assert len(rows) == len(names) + 1
    assert {row["state"] for row in rows.values()} == {"finished"}
    assert set(rows) == set(readers.run_index.names())
    for run in rows:
        assert readers._client.get("/api/run", params={"run": run}).json()["last_step"] == 23
    listed = readers.all_runs().ask().text
    assert listed.count("\n") == len(names) + 3
    assert "\x1b" not in listed
    for name in names:
        assert readers._ran(["show", os.fsdecode(name), "--runs", str(root)]).status == 0


def test_a_run_that_is_removed_while_it_is_looked_at_is_an_error_in_words(root: Path) -> None:
    sound_run(root / "other")
    readers = Readers(root)
    may_be_empty = ("output", "story")
    asked = readers.questions("mine", "other", root.parent)
    questions = [q for q in asked if not any(word in q.name for word in may_be_empty)]
    assert questions[0].ask().status == 200
    shutil.rmtree(root / "mine")
    for question in questions:
        if "mirror" not in question.name:
            answer = question.ask()
            is_told = answer.status in (404, 2) or '"error"' in answer.text
            assert is_told, question.name
            assert "Traceback" not in answer.text
    assert readers._client.get("/api/run", params={"run": "other"}).status_code == 200


def test_ten_thousand_files_in_a_folder_cost_little(root: Path) -> None:
    for folder in ("mine/log", "mine/log/nodes", "mine/checkpoints", "mine"):
        (root / folder).mkdir(exist_ok=True)
        for number in range(10_000 if folder == "mine/log" else 1000):
            (root / folder / f"x{number}").touch()
    readers = Readers(root)
    for question in readers.questions("mine", "mine", root.parent)[:3]:
        answer = question.ask()
        assert (answer.status, answer.seconds < 10.0) == (200, True)
    assert readers.table()["mine"]["last_step"] == 23


def test_one_run_that_fails_costs_its_row(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails under one run, which cannot be had here, is an error that reading raises."""
    sound_run(root / "other")

    def failing(path: Path, *, within: Path | None = None) -> object:
        if "mine" in path.parts and path.suffix == ".jsonl":
            raise OSError(5, "Input/output error", str(path))
        return opened(path, within=within)

    opened = segments.open_file
    monkeypatch.setattr(segments, "open_file", failing)
    readers = Readers(root)
    rows = readers.table()
    assert (rows["mine"]["state"], rows["other"]["state"]) == ("unreadable", "finished")
    assert "unreadable" in readers.all_runs().ask().text
    assert readers._client.get("/api/run", params={"run": "mine"}).status_code == 404
    assert readers._client.get("/api/run", params={"run": "other"}).status_code == 200
    compared = readers._client.get("/api/compare", params={"run": ["other", "mine"]}).json()
    assert "Input/output error" in compared["partings"][0]["error"]
    for command in ("show", "watch", "report"):
        said = readers._ran([command, "mine", "--runs", str(root)])
        assert (said.status, said.text.count("\n")) == (2, 1)


def test_the_dashboard_makes_nothing_behind_a_link(root: Path) -> None:
    (root.parent / "elsewhere").mkdir()
    (root / ".dashboard").rename(root.parent / "before")
    (root / ".dashboard").symlink_to(root.parent / "elsewhere")
    run_index = RunIndex(root)
    run_index.start()
    run_index.close()
    assert list((root.parent / "elsewhere").iterdir()) == []


def test_no_link_between_the_folder_of_runs_and_a_run_is_followed(root: Path) -> None:
    """The link comes after the run's name was looked at."""
    (root / "group").symlink_to(root.parent / "outside")
    run = root / "group" / CANARY
    assert programs.configuration(root / "mine", within=root).name
    with pytest.raises(ConfigError) as refused:
        programs.configuration(run, within=root)
    assert CANARY not in str(refused.value).replace(str(run), "")
    assert programs.last_processes(run, within=root) == 1
    assert programs.program(run, within=root) is None
    for act in (programs.stop, programs.kill):
        with pytest.raises(TrackingError):
            act(run, within=root)
    with pytest.raises(ConfigError):
        fork(run, "new", within=root)
    assert not (root.parent / "outside" / "new").exists()
