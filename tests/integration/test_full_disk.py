"""A disk too small for checkpoints: training goes on, every failure is said, and the end is an error."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.errors import CheckpointError
from harness.runlog.reader import open_run
from harness.training import train
from tests.support.runs import tiny_config


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for the log and for no checkpoint."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_training_goes_on_without_its_checkpoints_and_says_so(small_disk: Path, tmp_path: Path) -> None:
    undisturbed = train(tiny_config(tmp_path))
    with pytest.raises(CheckpointError, match="No space left"):
        train(tiny_config(tmp_path, f"--runs_dir={small_disk}"))
    run = open_run(small_disk / "tiny")
    failures = [event.details["num_steps"] for event in run.events("checkpoint_failed")]
    assert failures == [4, 8, 12]
    losses = run.scalars("train/loss").values.tolist()
    assert losses == open_run(undisturbed.directory).scalars("train/loss").values.tolist()
