"""A run is the same run at every number of ranks: the same samples in every step, in the memory it had."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from harness.cli.train import run as run_program
from harness.runlog.reader import open_run
from tests.support.launch import launch
from tests.support.runs import tiny

UNEVEN = ("--loop.global_batch=5", "--checkpoint.every=0", "--loop.eval_every=0", "--loop.steps=6")

RESTARTABLE = {"TORCHELASTIC_MAX_RESTARTS": "1", "TORCHELASTIC_RESTART_COUNT": "1"}
"""As under torchrun where machines may go; nothing starts this again."""


def losses(tmp_path: Path, name: str) -> np.ndarray:
    return open_run(tmp_path / "runs" / name).scalars("train/loss").values


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_that_do_not_divide_the_batch_train_on_the_same_one(strategy: str, tmp_path: Path) -> None:
    assert run_program(tiny(tmp_path, *UNEVEN, "--name=one")) == 0
    code, said = launch(
        tiny(tmp_path, *UNEVEN, "--name=two", f"--parallel.strategy={strategy}"), **RESTARTABLE
    )
    assert code == 0, said
    assert "a global batch of 5 does not go round on 2 ranks" in said
    # Sums in another order; a sample more or less would show in the second digit.
    np.testing.assert_allclose(losses(tmp_path, "two"), losses(tmp_path, "one"), rtol=1e-5)


def test_fewer_ranks_go_on_in_micro_batches_that_fitted_before(tmp_path: Path) -> None:
    code, said = launch(tiny(tmp_path, "--loop.steps=4", "--schedule.steps=12"))
    assert code == 0, said
    assert run_program(tiny(tmp_path, "--schedule.steps=12", "--loop.steps=8")) == 0
    run = open_run(tmp_path / "runs/tiny")
    assert (run.info["world_size"], run.info["micro_batch"]) == (1, 4)  # of a global batch of 8
