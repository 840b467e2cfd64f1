"""Under launchers: a run that is stopped has saved every step and leaves nobody behind, one that is killed
comes back by itself, and what another start would not cure is not started again."""

from __future__ import annotations

import random
import signal
import sys
from pathlib import Path

import pytest

from scripts.bench_operations import STOPPED, kill_run
from scripts.chaos import run_whole
from tests.support.operations import LAUNCHERS, begin, judge_stop
from tests.support.runs import program, tiny

RESTARTING = [*LAUNCHERS["torchrun"], "--max-restarts=3"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "number"),
    [
        ("torchrun", signal.SIGTERM),
        ("torchrun", signal.SIGKILL),
        ("accelerate", signal.SIGTERM),
        ("accelerate", signal.SIGKILL),
    ],
)
def test_a_signal_to_the_launcher_saves_every_step_and_leaves_no_process(
    launcher: str, number: signal.Signals, tmp_path: Path
) -> None:
    run = begin(launcher, tmp_path, *STOPPED)
    run.wait_for_step(5)
    stop = judge_stop(run, number)
    assert stop.troubles(launcher, number) == []


@pytest.mark.slow
def test_a_stop_while_the_run_starts_is_committed_too(tmp_path: Path) -> None:
    run = begin("python", tmp_path, *STOPPED)
    run.wait_for_ranks()
    stop = judge_stop(run, signal.SIGTERM)
    assert stop.troubles("python", signal.SIGTERM) == []
    assert stop.steps == 0


@pytest.mark.slow
def test_killed_ranks_start_again_under_the_same_agent_bit_for_bit(tmp_path: Path) -> None:
    run_whole(tmp_path, "ddp")
    kills = kill_run(tmp_path, "killed", random.Random(0), most_kills=2)
    assert kills.total() == 2


@pytest.mark.slow
def test_a_rehearsed_kill_strikes_once_in_a_run_and_not_once_in_a_process(tmp_path: Path) -> None:
    fault = "--faults=[{step: 9, rank: 1, kind: kill}]"
    code, output = program(tiny(tmp_path, fault), launcher=RESTARTING)
    assert code == 0, output
    assert output.count("fault strikes") == 1
    assert "fault has struck in an earlier attempt" in output


FINAL = {
    "a misspelt key": (["--loop.stepz=3"], "ConfigError"),
    "no such data": (["--data.paths=[/nowhere]"], "DataError"),
    "instability": (["--guard.nonfinite=stop", "--faults=[{step: 3, kind: nan}]"], "InstabilityError"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FINAL)
def test_what_a_restart_cannot_cure_is_not_started_again(name: str, tmp_path: Path) -> None:
    more, error = FINAL[name]
    code, output = program(tiny(tmp_path, *more), launcher=RESTARTING)
    assert code == 1
    assert output.count(error) == 1, output


@pytest.mark.slow
def test_damaged_checkpoints_are_an_error_at_every_start(tmp_path: Path) -> None:
    assert program(tiny(tmp_path))[0] == 0
    for shard in (tmp_path / "runs/tiny/checkpoints").glob("step-*/*.safetensors"):
        shard.write_bytes(b"\xff" * shard.stat().st_size)
    for _ in range(2):
        code, output = program(tiny(tmp_path, "--loop.steps=20"), launcher=[sys.executable])
        assert code == 2
        assert "CheckpointError" in output
    assert not list((tmp_path / "runs/tiny/checkpoints").glob("step-*"))
