"""Commands that take a run: a misspelt name, a tracker's checkpoints, names that a terminal would obey."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harness import ExperimentTracker
from harness.cli.main import main
from harness.cli.output import say
from harness.tracking import RunLog
from harness.tracking.experiment import ExperimentConfig
from harness.tracking.text import printable

COMMANDS = {
    "show": [],
    "watch": ["--once"],
    "report": [],
    "sync": [],
    "verify": [],
    "export": [],
    "export csv": ["--format", "csv"],
    "export llama": ["--names", "llama"],
}
HOSTILE = "\x1b]0;owned\x07\x1b[2J\x1b[8mhid\u202eden\u2066\x9b31m\r\nforged: line\x00\u2028"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for name in ("quickstart", "sweeps/lr-0.1", "sweeps/lr-0.2"):
        RunLog(tmp_path / "runs" / name).close()
    return tmp_path / "runs"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that is said."""
    capsys.readouterr()
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err


@pytest.mark.parametrize("command", [*COMMANDS, "compare"])
@pytest.mark.parametrize(
    ("wanted", "nearest"),
    [
        ("quikstart", "quickstart"),
        ("lr-0.2", "sweeps/lr-0.2"),
        ("sweeps/lr-0.3", "sweeps/lr-0."),
        ("\0", "lists"),
    ],
)
def test_a_misspelt_run_is_answered_with_the_nearest(
    command: str, wanted: str, nearest: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["quickstart"] if command == "compare" else COMMANDS[command]
    said = refused(capsys, command.split()[0], wanted, *more, "--runs", str(runs))
    assert "there is no run" in said
    assert nearest in said
    assert ("Did you mean" in said) == (nearest != "lists")
    if command == "compare":
        assert nearest in refused(capsys, "compare", "quickstart", wanted, "--runs", str(runs))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_is_no_run_is_refused(
    command: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    refused(capsys, command.split()[0], str(tmp_path / "photos"), *COMMANDS[command])
    assert list((tmp_path / "photos").iterdir()) == []


def test_a_name_means_the_run_where_a_folder_has_it_too(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "quickstart").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["show", "quickstart"]) == 0
    assert "finished" in capsys.readouterr().out


def test_there_is_no_folder_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no folder" in refused(capsys, "runs", str(tmp_path / "none"))
    assert "there is no run" in refused(capsys, "show", "it", "--runs", str(tmp_path / "none"))


def test_a_run_that_cannot_be_written_to_is_exported_elsewhere(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (runs / "quickstart" / "export").write_text("a file where a folder would be made")
    for more in (["--format", "csv"], ["-o", str(runs / "quickstart" / "export" / "x"), "--format", "json"]):
        assert "cannot be written" in refused(capsys, "export", "quickstart", "--runs", str(runs), *more)


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        (["--adapters"], "Add --format hf"),
        (["--adapters", "--format", "csv"], "Add --format hf"),
        (["--names", "llama", "--format", "hf"], "Leave --names away"),
        (["--adapters", "--format", "hf"], "the run has no adapters: its task is text"),
    ],
)
def test_options_of_an_export_that_its_format_does_not_heed_are_refused(
    options: list[str], remedy: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (runs / "quickstart" / "config.yaml").write_text("task: text\n")
    (runs / "quickstart" / "checkpoints").mkdir()
    assert remedy in refused(capsys, "export", "quickstart", "--runs", str(runs), *options)


def exported(runs: Path, format: str) -> dict[str, torch.Tensor]:
    """The weights of the run `mine`."""
    file = runs / f"weights.{format}"
    assert main(["export", "mine", "--runs", str(runs), "--format", format, "-o", str(file)]) == 0
    weights: dict[str, torch.Tensor] = load_file(file) if format == "safetensors" else torch.load(file)
    return weights


def test_the_checkpoints_of_a_tracker_are_found_where_it_was_run_and_after_a_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work, elsewhere = tmp_path / "work", tmp_path / "elsewhere"
    work.mkdir()
    monkeypatch.chdir(work)  # the tracker's folders are relative by default
    model = torch.nn.Linear(3, 2)
    config = ExperimentConfig.basic(run_name="mine", enable_tensorboard=False)
    with ExperimentTracker(config, rank=0) as tracker:
        tracker.save_checkpoint(model, step=7)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(work / "runs", elsewhere / "runs")
    for move in (False, True):
        runs = [work / "runs", elsewhere / "runs"]
        if move:
            runs = [work.rename(tmp_path / "archive") / "runs"]
        for folder in runs:
            assert main(["verify", "mine", "--runs", str(folder)]) == 0
            assert "step 7: intact" in capsys.readouterr().out
            for format in ("safetensors", "torch"):
                weights = exported(folder, format)
                assert weights.keys() == model.state_dict().keys()
                assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    folder = tmp_path / "archive" / "models" / "mine"
    assert main(["verify", str(folder)]) == 0
    shard = next(folder.rglob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert main(["verify", str(folder)]) == 1
    shutil.rmtree(folder / "step-00000007")
    assert main(["verify", str(folder)]) == 2


def test_nothing_that_is_printed_is_obeyed_by_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    info = {"host": HOSTILE, "command": [HOSTILE], "config": {"tracking": {"group": HOSTILE, HOSTILE: 1}}}
    folder = HOSTILE.replace("\0", "")
    for name in (folder, "plain"):
        with RunLog(runs / name, info=info) as log:
            log.write("step", {HOSTILE: 1.0, "train/loss": 2.0}, step=0)
            log.write("event", {"name": HOSTILE, "summary": HOSTILE, HOSTILE: HOSTILE}, step=0)
            log.write("hparams", {HOSTILE: HOSTILE, "b": folder + name})
            log.write("end", {"state": HOSTILE, "reason": HOSTILE})
        checkpoint = runs / name / "checkpoints" / "step-00000001"
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").write_text(json.dumps(HOSTILE))
    (runs / "plain" / "config.yaml").write_text(json.dumps({HOSTILE: HOSTILE}))
    commands = [["runs", str(runs)]] + [
        [command, run, *more, "--runs", str(runs)]
        for run in (folder, "plain", folder + "x", str(runs / folder))
        for command, more in (
            *((name.split()[0], more) for name, more in COMMANDS.items() if name != "sync"),
            ("compare", ["plain"]),
        )
    ]
    for command in commands:
        main(command)
        out, err = capsys.readouterr()
        for line in (out + err).split("\n"):
            assert printable(line, longest=len(line)) == line, command
        assert not any(line.startswith("forged") for line in out.split("\n")), command
    report = (runs / "plain" / "report.html").read_text()
    assert [char for char in HOSTILE if char in report and char not in "\n" and not char.isprintable()] == []


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_the_terminal_cannot_spell_is_replaced(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, errors="strict"))
    say("─ ü \udcff\nnext")
    sys.stdout.flush()
    assert raw.getvalue().decode(encoding).endswith("\nnext\n")


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    with RunLog(tmp_path / "long") as log:
        for step in range(3):
            log.write("step", {f"metric/{number}": 1.0 for number in range(5000)}, step=step)
    code = "from harness.cli.main import main; raise SystemExit(main(['show', 'long', '--runs', '.']))"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as shown:
        assert shown.stdout is not None
        assert shown.stderr is not None
        assert shown.stdout.readline().startswith(b"long: ")
        shown.stdout.close()
        assert (shown.stderr.read(), shown.wait(timeout=60)) == (b"", 141)
