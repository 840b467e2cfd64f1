"""The helper that all distributed tests rest on: it has to fail when a rank does."""

import os
import signal
import time

import pytest
import torch
import torch.distributed

from tests.support.distributed import RanksFailed, run_ranks


def _sum_of_ranks(rank: int, world_size: int) -> float:
    value = torch.tensor(float(rank))
    torch.distributed.all_reduce(value)
    return value.item()


def _raise_on(rank: int, world_size: int, culprit: int) -> None:
    if rank == culprit:
        raise ValueError("told to")
    torch.distributed.barrier()


def _die_on(rank: int, world_size: int, culprit: int) -> None:
    if rank == culprit:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.barrier()


def _hang(rank: int, world_size: int) -> None:
    time.sleep(60)


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_rank_returns_its_result(world_size: int) -> None:
    assert run_ranks(_sum_of_ranks, world_size) == [sum(range(world_size))] * world_size


def test_a_rank_that_raises_is_named_with_its_traceback() -> None:
    with pytest.raises(RanksFailed, match=r"rank 1: exit code 1[\s\S]*told to"):
        run_ranks(_raise_on, 2, 1)


def test_a_rank_that_is_killed_is_named() -> None:
    with pytest.raises(RanksFailed, match="rank 0: exit code -9"):
        run_ranks(_die_on, 2, 0)


def test_ranks_that_hang_are_killed() -> None:
    start = time.monotonic()
    with pytest.raises(RanksFailed, match="still running"):
        run_ranks(_hang, 2, timeout_s=2.0)
    assert time.monotonic() - start < 50  # they sleep for 60
