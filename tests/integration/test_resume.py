"""Nothing is lost: a run that was killed, stopped or lengthened is the run that it would have been."""

import re
import signal
import sys
from pathlib import Path

import pytest
import torch

from harness.checkpoint import Checkpointer
from harness.cli.train import EXIT_STOPPED
from harness.models import build_model
from harness.runlog.reader import open_run
from harness.training import train
from tests.support.launch import launch
from tests.support.runs import PROGRAM, program, start, tiny, tiny_config

TORCHRUN = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node=2"]


def losses(runs: Path) -> list[float]:
    return open_run(runs / "tiny").scalars("train/loss").values.tolist()


def last_weights(runs: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    config = tiny_config(tmp_path)
    model = build_model(config.model, sequence_length=config.data.sequence_length)
    with Checkpointer(runs / "tiny/checkpoints") as checkpoints:
        assert checkpoints.load({"model": model}) is not None
    return model.state_dict()


def assert_same_run(one: Path, other: Path, tmp_path: Path) -> None:
    """Every step's loss and the last weights, bit for bit."""
    assert losses(one) == losses(other)
    first, second = last_weights(one, tmp_path), last_weights(other, tmp_path)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "victim"), [("ddp", 0), ("fsdp", 1)])
def test_a_killed_run_of_two_processes_goes_on_bit_for_bit(
    strategy: str, victim: int, tmp_path: Path
) -> None:
    common = [f"--parallel.strategy={strategy}", "--model.dropout=0.1", "--loop.micro_batch=2"]
    whole = tiny(tmp_path, *common, f"--runs_dir={tmp_path / 'whole'}")
    code, output = launch(whole)
    assert code == 0, output
    broken = tiny(tmp_path, *common, f"--runs_dir={tmp_path / 'broken'}")
    fault = f"--faults=[{{step: 9, rank: {victim}, kind: kill}}]"
    code, _ = program([*broken, fault], launcher=TORCHRUN)
    assert code != 0
    code, output = launch(broken)
    assert code == 0, output
    # The save after 8 steps may or may not have been committed when the kill came.
    assert re.search("going on at step [48] of 12", output)
    assert_same_run(tmp_path / "whole", tmp_path / "broken", tmp_path)


def test_a_run_that_is_lengthened_goes_on_where_it_ended(tmp_path: Path) -> None:
    constant = "--schedule.kind=constant"
    train(tiny_config(tmp_path, constant, f"--runs_dir={tmp_path / 'whole'}"))
    parts = [constant, f"--runs_dir={tmp_path / 'parts'}"]
    assert train(tiny_config(tmp_path, *parts, "--loop.steps=5")).steps == 5
    result = train(tiny_config(tmp_path, *parts))
    assert (result.status, result.steps) == ("finished", 12)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", tmp_path)


def rates(runs: Path) -> list[float]:
    return open_run(runs / "tiny").scalars("train/lr").values.tolist()


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_prolonging_a_run_does_not_move_its_learning_rate(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [f"--schedule.kind={kind}", "--loop.eval_every=0"]
    whole = [*common, f"--runs_dir={tmp_path / 'whole'}", "--loop.steps=9", "--schedule.steps=5"]
    train(tiny_config(tmp_path, *whole))
    parts = [*common, f"--runs_dir={tmp_path / 'parts'}"]
    for steps in (5, 7, 9):  # prolonged twice
        train(tiny_config(tmp_path, *parts, f"--loop.steps={steps}"))
    seen = rates(tmp_path / "parts")
    assert seen == rates(tmp_path / "whole")
    assert seen[5:] == pytest.approx([3e-3 * 0.1] * 4)
    assert "it stays at 0.0003 from step 5 on (--schedule.steps 9 makes it" in capsys.readouterr().err
    assert_same_run(tmp_path / "whole", tmp_path / "parts", tmp_path)


def test_a_schedule_is_stretched_only_on_demand_and_stays_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = f"--runs_dir={tmp_path / 'runs'}"
    for more in (["--loop.steps=4"], ["--loop.steps=6", "--schedule.steps=12"], []):
        train(tiny_config(tmp_path, runs, "--loop.eval_every=0", *more))
    train(tiny_config(tmp_path, f"--runs_dir={tmp_path / 'whole'}", "--loop.eval_every=0"))
    assert rates(tmp_path / "runs")[4:] == rates(tmp_path / "whole")[4:]
    assert "where --schedule.steps 4 gave 0.0003" in capsys.readouterr().err


def test_a_finished_run_that_is_started_again_says_so_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = train(tiny_config(tmp_path))
    again = train(tiny_config(tmp_path))
    assert (again.status, again.steps, again.tokens) == ("finished", first.steps, first.tokens)
    assert "raise --loop.steps" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_commits_a_checkpoint_and_the_exit_code_says_so(
    number: signal.Signals, tmp_path: Path
) -> None:
    process = start([sys.executable, PROGRAM, *tiny(tmp_path, "--loop.steps=100000", "--checkpoint.every=0")])
    assert process.stdout is not None
    for line in process.stdout:
        if "step 8/" in line:
            process.send_signal(number)
            break
    output = process.communicate(timeout=60)[0]
    assert process.returncode == EXIT_STOPPED, output
    (saved,) = Checkpointer(tmp_path / "runs/tiny/checkpoints").steps()
    assert saved >= 8
    assert open_run(tmp_path / "runs/tiny").state() == "stopped"


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    slow = "--faults=[{step: 8, kind: slow, seconds: 60}]"
    process = start([sys.executable, PROGRAM, *tiny(tmp_path, slow)])
    assert process.stdout is not None
    for line in process.stdout:
        if "fault strikes" in line:
            break
    process.send_signal(signal.SIGINT)
    for line in process.stdout:
        if "Ctrl-C again" in line:
            break
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130
    process.stdout.close()
