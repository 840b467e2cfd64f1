"""What has fitted into memory bounds the micro-batches of the attempts that follow, and does not shrink."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest
import torch

from harness.data import Shares
from harness.dist import World
from harness.training.micro_batch import NOTED, keep_micro_batch
from tests.support.runs import tiny_config


@pytest.mark.parametrize(
    ("noted", "global_batch", "world_size", "bound", "size"),
    [(128, 1024, 7, 128, 32), (128, 1024, 8, 128, 128), (16, 1024, 8, 16, 16), (16, 24, 1, 16, 12)],
)
def test_an_attempt_is_bounded_by_what_has_fitted_not_by_the_last_size(
    tmp_path: Path, noted: int, global_batch: int, world_size: int, bound: int, size: int
) -> None:
    log = tmp_path / "log"
    log.mkdir()
    begun = {"kind": "run", "attempt": 0, "step": None, "time": 1.0, "values": {NOTED: noted}}
    (log / "00000000.jsonl").write_bytes(orjson.dumps(begun) + b"\n")
    world = World(rank=0, local_rank=0, world_size=world_size, device=torch.device("cpu"))
    config, before = keep_micro_batch(
        tiny_config(tmp_path, f"--loop.global_batch={global_batch}"), world, tmp_path
    )
    assert before == bound
    assert Shares.of(global_batch, world_size, at_most=config.loop.micro_batch).micro_batch == size
