"""Ranks of which only some can measure by the compiled loop."""

from __future__ import annotations

import os

import torch.distributed as dist

from harness import StepGuard
from harness.stability import native
from tests.support.distributed import run_ranks
from tests.support.silent_errors import adamw, network


def _is_used(rank: int, world_size: int) -> bool:
    if rank == 1:
        os.environ["HARNESS_NATIVE"] = "0"
    model = network()
    StepGuard(model, adamw(model), group=dist.group.WORLD).close()
    return native.is_available()


def test_the_compiled_loop_is_used_by_all_ranks_or_by_none() -> None:
    assert run_ranks(_is_used, 2) == [False, False]
