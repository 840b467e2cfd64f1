"""The ladder in a real run: back to a healthy checkpoint, past the data that broke it, and at last a stop."""

from pathlib import Path

import pytest
import torch

from harness.errors import InstabilityError
from harness.runlog.reader import open_run
from harness.training import train
from tests.support.launch import launch
from tests.support.runs import tiny, tiny_config

GUARD = ["--guard.rollback_skip_steps=6", "--guard.rollback_cooldown_steps=3", "--checkpoint.healthy_after=2"]
LENGTH = ["--loop.steps=24", "--guard.max_consecutive_skips=2"]


def nans(steps: range, rank: int = 0) -> str:
    faults = ", ".join(f"{{step: {step}, rank: {rank}, kind: nan}}" for step in steps)
    return f"--faults=[{faults}]"


def test_skips_in_a_row_roll_the_run_back_and_past_its_data(tmp_path: Path) -> None:
    result = train(tiny_config(tmp_path, *GUARD, *LENGTH, nans(range(13, 16))))
    assert (result.status, result.steps, result.num_skips) == ("finished", 24, 3)
    assert result.incidents == {"non-finite gradient": 3}
    run = open_run(tmp_path / "runs/tiny")
    (event,) = run.events("rollback")
    assert event.details["failed_step"] == 15
    assert event.details["skipped_samples"] >= (15 + 1 - event.step) * 8
    losses = run.scalars("train/loss")
    assert losses.steps.tolist() == list(range(24))
    abandoned = run.scalars("train/loss", attempt=0)
    assert abandoned.steps[-1] == 15
    assert torch.tensor(losses.values).isfinite().all()


def test_a_run_that_does_not_recover_is_stopped_with_a_report(tmp_path: Path) -> None:
    arguments = [*GUARD, *LENGTH, nans(range(6, 24)), "--guard.max_rollbacks=1", "--checkpoint.every=2"]
    with pytest.raises(InstabilityError, match=r"in a row were skipped[\s\S]*NaN[\s\S]*rank 0") as caught:
        train(tiny_config(tmp_path, *arguments))
    assert caught.value.exit_code == 3
    run = open_run(tmp_path / "runs/tiny")
    assert run.state() == "unstable"
    assert "in a row were skipped" in run.events("stop")[0].details["reason"]


def test_without_a_healthy_checkpoint_the_run_is_stopped(tmp_path: Path) -> None:
    arguments = [*GUARD, *LENGTH, nans(range(1, 9))]
    with pytest.raises(InstabilityError, match="no healthy checkpoint"):
        train(tiny_config(tmp_path, *arguments))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_both_ranks_roll_back_when_one_is_at_fault(strategy: str, tmp_path: Path) -> None:
    arguments = tiny(
        tmp_path, *GUARD, *LENGTH, nans(range(13, 16), rank=1), f"--parallel.strategy={strategy}"
    )
    code, output = launch(arguments)
    assert code == 0, output
    run = open_run(tmp_path / "runs/tiny")
    assert len(run.events("rollback")) == 1
    assert run.scalars("train/loss").steps.tolist() == list(range(24))
    assert {event.details["rank"] for event in run.events("incident")} <= {1}
