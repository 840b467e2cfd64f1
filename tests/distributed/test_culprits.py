"""An incident leads to the samples that caused it, by their index in the data set, on every rank that had
one."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

from harness.config import ParallelConfig
from harness.data import Loader
from harness.dist import World, distribute, gradient_sync
from harness.stability import Incident, StepGuard
from tests.support.distributed import run_ranks

BAD = {3, 11, 12, 20}
MICRO_BATCH, MICRO_BATCHES = 3, 2


class Numbers:
    """29 samples, four of which are NaN."""

    def __len__(self) -> int:
        return 29

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        value = torch.nan if index in BAD else 1.0 + index % 3
        return {"id": torch.tensor(index), "x": torch.full((4,), value)}


def find_bad(rank: int, world_size: int, strategy: str) -> list[str]:
    """Trains over three epochs; what the incidents told wrongly."""
    torch.manual_seed(0)
    world = World(rank=rank, local_rank=rank, world_size=world_size, device=torch.device("cpu"))
    model = distribute(nn.Linear(4, 1), ParallelConfig(strategy=strategy), world)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    guard = StepGuard(model, optimizer, lag_steps=1, ladder=False)
    share = MICRO_BATCH * MICRO_BATCHES
    loader = Loader(
        Numbers(),
        global_batch=share * world_size,
        micro_batch=MICRO_BATCH,
        rank=rank,
        world_size=world_size,
        seed=5,
    )
    positions, truth = [], []
    for _ in range(8):
        positions.append(loader.position)
        batches = loader.next()
        truth.append([sorted(BAD & set(batch["id"].tolist())) for batch in batches])
        for index, batch in enumerate(batches):
            with gradient_sync(model, on=index == MICRO_BATCHES - 1):
                loss = model(batch["x"]).square().sum()
                loss.backward()
                guard.accumulate(loss, MICRO_BATCH, is_last=index == MICRO_BATCHES - 1)
        guard.step()
        optimizer.zero_grad()
    everywhere: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(everywhere, truth)
    wrong = []
    for record in guard.drain(wait=True):
        first_bad = [
            (next(i for i, bad in enumerate(ranks[record.step]) if bad), r)
            for r, ranks in enumerate(everywhere)
            if any(ranks[record.step])
        ]
        samples_of = functools.partial(loader.step_indices, positions[record.step])
        incident = Incident.of(record, samples_of=samples_of)
        told = [] if incident is None else [(c.micro_batch, c.rank) for c in incident.culprits]
        if told != sorted(first_bad):
            wrong.append(f"step {record.step}: {told}, not {sorted(first_bad)}")
        for culprit in () if incident is None else incident.culprits:
            bad = everywhere[culprit.rank][record.step][culprit.micro_batch]
            if len(culprit.samples) != MICRO_BATCH or not set(bad) <= set(culprit.samples):
                wrong.append(f"step {record.step}: {culprit.samples} does not hold {bad}")
    return wrong


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_bad_samples_are_found_on_every_rank(strategy: str) -> None:
    assert run_ranks(find_bad, 2, strategy) == [[], []]
