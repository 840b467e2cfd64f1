"""What several ranks keep of an incident: each its own, rank 0 what happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from harness import TrainConfig
from harness.dist import World
from harness.errors import HarnessError
from harness.runlog.incident_files import STACKS, rank_path, ranks_in, read_incident, read_rank, read_rng
from harness.runlog.paths import incident_dir
from harness.stop import StopRequest
from harness.tracking.mirrors import MirrorHandle
from harness.training import Callback
from harness.training.build import Watchdog, _train
from tests.support.distributed import run_ranks
from tests.support.launch import launch
from tests.support.runs import ROOT, tiny, tiny_config


def trained(rank: int, world_size: int, config: TrainConfig) -> str:
    """As `train` does it, within the group that is there; the error that ended it."""
    world = World(rank=rank, local_rank=rank, world_size=world_size, device=torch.device("cpu"))
    no_mirrors = patch("harness.tracking.recorder.start_mirrors", lambda *_: MirrorHandle(None))
    with no_mirrors, StopRequest() as stop:
        try:
            _train(config, world, stop, (), None, Watchdog(config))
        except HarnessError as error:
            return str(error)
    return ""


def test_a_nan_on_rank_1_is_kept_with_its_rank_parameter_samples_and_file_offsets(tmp_path: Path) -> None:
    fault = "{step: 5, kind: nan, rank: 1, micro_batch: 1, parameter: blocks.1.attention.out.weight}"
    more = (f"--faults=[{fault}]", "--loop.micro_batch=2", "--parallel.device=cpu", "--loop.steps=8")
    assert run_ranks(trained, 2, tiny_config(tmp_path, *more)) == ["", ""]
    folder = incident_dir(tmp_path / "runs" / "tiny", 5)
    what = read_incident(folder)
    assert (what.rank, what.micro_batch, what.parameter) == (1, 1, "blocks.1.attention.out.weight")
    assert what.culprit_parameters["blocks.1.attention.out.weight"].num_nan == 1
    assert ranks_in(folder) == [0, 1]
    theirs = read_rank(folder, 1).at(5)
    assert theirs is not None
    assert what.samples[1] == theirs.samples
    assert what.culprits[0].samples == theirs.samples[1]
    assert set(what.sources) == {str(index) for index in theirs.samples[1]}
    for source in what.sources.values():
        path, _, offset = source.partition(", ")[0].rpartition(":")
        assert Path(path).is_relative_to(tmp_path / "corpus")
        assert 0 <= int(offset) < Path(path).stat().st_size
    assert read_rng(folder, 0, 5)["torch"] != read_rng(folder, 1, 5)["torch"], "each rank has its own stream"
    assert what.checkpoint == "step-00000004"


class _Fails(Callback):
    def on_step(self, run: Any, record: Any) -> None:
        if record.step == 4 and run.world.rank == 1:
            raise ZeroDivisionError("of this test")


def fails(config: TrainConfig) -> Callback:
    return _Fails()


def test_a_crash_is_kept_as_that_of_the_rank_that_it_happened_on(tmp_path: Path) -> None:
    more = (
        f"--callbacks=[{__name__}:fails]",
        "--guard.lag_steps=0",
        "--parallel.threads=1",
        "--loop.steps=8",
    )
    code, output = launch(tiny(tmp_path, *more), PYTHONPATH=str(ROOT))
    assert code != 0, output
    folder = incident_dir(tmp_path / "runs" / "tiny", 4)
    what = read_incident(folder)
    assert (what.kind, what.rank) == ("crash", 1)
    assert what.culprits[0].samples == what.samples[1][0]
    assert "ZeroDivisionError: of this test" in (read_rank(folder, 1).error or "")
    assert "ZeroDivisionError: of this test" in rank_path(folder, STACKS, 1).read_text()
