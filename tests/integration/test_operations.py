"""Under launchers: a run that is stopped has saved every step and leaves nobody behind, one that is killed
comes back by itself, and what another start would not cure is not started again."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from torch import Tensor, nn

from harness import env
from harness.cli.train import run as run_program
from harness.config import TrainConfig
from harness.data import LossSum, Task
from scripts.bench_operations import STOPPED
from scripts.chaos import arguments, compare, run_whole
from tests.support.operations import LAUNCHERS, begin, judge_stop
from tests.support.own_tasks import points_task, squared_error
from tests.support.runs import program, tiny

RESTARTING = [*LAUNCHERS["torchrun"], "--max-restarts=3"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "number"), [("torchrun", signal.SIGTERM), ("accelerate", signal.SIGKILL)]
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
def test_a_killed_rank_starts_again_under_the_same_agent_bit_for_bit_and_is_killed_once(
    tmp_path: Path,
) -> None:
    run_whole(tmp_path, "ddp")
    fault = "--faults=[{step: 31, rank: 1, kind: kill}]"
    code, output = program(
        [*arguments(tmp_path, "killed", "ddp"), fault], launcher=RESTARTING, timeout_s=180.0
    )
    assert code == 0, output
    assert output.count("fault strikes") == 1
    assert "fault has struck in an earlier attempt" in output
    compare(tmp_path, "ddp-whole", "killed")


def fails_on_rank_1(config: TrainConfig) -> Task:
    """A task whose loss cannot be computed on one rank, and not on the first."""

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> LossSum:
        if env.launched().rank == 1:
            raise ValueError("no loss here")
        return squared_error(model, batch)

    return points_task(loss=loss)


OWN_TASK = [f"--task={__name__}:fails_on_rank_1", "--data.paths=[]"]
FINAL = {
    "before the ranks meet": (["--loop.stepz=3"], "ConfigError:"),
    "on one rank": (OWN_TASK, "TaskError on rank 1:"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FINAL)
def test_what_a_restart_cannot_cure_is_not_started_again(name: str, tmp_path: Path) -> None:
    more, error = FINAL[name]
    code, output = program(tiny(tmp_path, *more), launcher=RESTARTING)
    assert code == 1
    assert output.count(error) == 1, output
    if "task" in more[0]:
        frame = f'  File "{__file__}", line '
        assert output.count(frame) == 1, output
        assert output.count('raise ValueError("no loss here")') == 1, output


def test_damaged_checkpoints_are_an_error_at_every_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_program(tiny(tmp_path)) == 0
    for shard in (tmp_path / "runs/tiny/checkpoints").glob("step-*/*.safetensors"):
        shard.write_bytes(b"\xff" * shard.stat().st_size)
    for _ in range(2):
        assert run_program(tiny(tmp_path, "--loop.steps=20")) == 2
        assert "CheckpointError" in capsys.readouterr().err
    assert not list((tmp_path / "runs/tiny/checkpoints").glob("step-*"))
