"""What cannot run says so in one line, with a non-zero exit, and leaves nothing half-written."""

from pathlib import Path

import pytest

from harness.checkpoint import Checkpointer
from harness.cli.train import run
from tests.support.runs import tiny


def files_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Runs the program in this process; its one line of complaint."""
    capsys.readouterr()
    assert run(arguments) == 2
    complaints = [line for line in capsys.readouterr().err.splitlines() if "Error" in line]
    assert len(complaints) == 1
    return complaints[0]


def prepare(folder: Path) -> dict[str, Path]:
    """Inputs that are wrong in one way each."""
    empty, short, hollow = folder / "empty", folder / "short", folder / "hollow"
    for place in (empty, short, hollow):
        place.mkdir()
    for number in range(9):
        (short / f"{number}.txt").write_text("ab")
        (hollow / f"{number}.txt").write_bytes(b"\0binary")
    (folder / "dangling.txt").symlink_to(folder / "nowhere")
    (folder / "in_the_way").write_text("a file")
    return {"empty": empty, "short": short, "hollow": hollow}


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("--data.paths=[{folder}/missing]", ["missing"]),
        ("--data.paths=[{folder}/empty]", ["empty"]),
        ("--data.paths=[{folder}/hollow]", ["no text"]),
        ("--data.paths=[{folder}/dangling.txt]", ["dangling.txt"]),
        ("--data.paths=[{folder}/short]", ["sequence"]),
        ("--data.cache_dir={folder}/in_the_way/cache", ["in_the_way"]),
        ("--runs_dir={folder}/in_the_way", ["in_the_way", "--runs_dir"]),
        ("--loop.global_batch=9", ["loop.global_batch"]),
        ("--loop.steps=-3", ["loop.steps", "-3"]),
        ("--optim.learning_rate=1", ["optim.lr"]),
        ("--guard.spike_rule=typo", ["guard.spike_rule", "typo"]),
        ("--resume=must", ["resume", "must"]),
        ("--task=nowhere.to_be:found", ["nowhere"]),
        ("--faults=[{{step: 1, parameter: nobody}}]", ["nobody"]),
        ("--parallel.device=cuda", ["cuda"]),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    setting: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(tmp_path)
    arguments = tiny(tmp_path, "--loop.micro_batch=2", setting.format(folder=tmp_path))
    before = files_below(tmp_path)
    complaint = refused(arguments, capsys)
    assert [word for word in words if word not in complaint] == []
    written = files_below(tmp_path) - before - files_below(tmp_path / "cache")
    assert written == set()


def test_a_run_of_another_configuration_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny(tmp_path, "--loop.steps=2")) == 0
    complaint = refused(tiny(tmp_path, "--optim.lr=0.5"), capsys)
    assert "optim.lr = 0.003" in complaint
    assert "--name" in complaint


def test_a_finished_run_is_never_started_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tiny(tmp_path, "--loop.steps=2")) == 0
    assert "never" in refused(tiny(tmp_path, "--resume=never"), capsys)


def test_a_folder_with_something_else_in_it_is_not_taken_for_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "runs" / "tiny"
    other.mkdir(parents=True)
    (other / "thesis.tex").write_text("years of work")
    assert "not empty" in refused(tiny(tmp_path), capsys)
    assert files_below(other) == {other / "thesis.tex"}


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = tiny(tmp_path, "--loop.steps=2")
    assert run(arguments) == 0
    saved = tmp_path / "runs/tiny/config.yaml"
    saved.write_text(saved.read_text().replace("num_layers: 2", "num_layers: 3"))
    complaint = refused([*arguments, "--model.num_layers=3"], capsys)
    assert "blocks.2" in complaint
    assert Checkpointer(tmp_path / "runs/tiny/checkpoints").steps() == [2]
