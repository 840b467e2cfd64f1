"""Two ranks that share one GPU, over gloo: NCCL wants a GPU for each."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from harness.dist import gradient_sync
from harness.records import StepRecord
from harness.stability import StepGuard
from tests.support.distributed import run_ranks
from tests.support.guarded import OPTIMIZERS, batch, make_model, snapshot, worst_difference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _train(rank: int, world_size: int, culprit: int) -> list[StepRecord]:
    """Three steps of two micro-batches; a NaN of one rank in step 1 leaves every bit as it was."""
    torch.cuda.set_device(0)
    model = DistributedDataParallel(make_model().cuda(), gradient_as_bucket_view=True)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    guard = StepGuard(model, optimizer)
    for step in range(3):
        before = snapshot(model, optimizer)
        for micro_batch in range(2):
            with gradient_sync(model, on=micro_batch == 1):
                strikes = (step, rank, micro_batch) == (1, culprit, 0)
                handle = model.module[2].weight.register_hook(lambda g: g * math.nan) if strikes else None
                inputs, targets = (tensor.cuda() for tensor in batch(step, rank, micro_batch))
                loss = nn.functional.mse_loss(model(inputs), targets)
                loss.backward()
                guard.accumulate(loss)
                if handle is not None:
                    handle.remove()
        guard.step()
        optimizer.zero_grad()
        assert (worst_difference(before, snapshot(model, optimizer)) == "") == (step == 1)
    return guard.drain(wait=True)


@pytest.mark.parametrize("culprit", [0, 1])
def test_one_ranks_nan_is_skipped_by_both_and_blamed_on_it(culprit: int) -> None:
    first, second = run_ranks(_train, 2, culprit)
    assert first == second
    assert [record.verdict == "skip" for record in first] == [False, True, False]
    bad = first[1]
    assert (bad.rank, bad.parameter, bad.micro_batch, bad.num_nan) == (culprit, "2.weight", 0, 64)
    assert [row.num_nan for row in bad.per_rank] == [64 * (rank == culprit) for rank in range(2)]
