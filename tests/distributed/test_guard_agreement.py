"""The same batch gives the same record, however the model is spread."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from harness.config import ModelConfig, ParallelConfig
from harness.dist import World, distribute, gradient_sync
from harness.models import build_model
from harness.records import StepRecord
from harness.stability import StepGuard
from tests.support.distributed import run_ranks

SAMPLES, LENGTH, STEPS, MICRO_BATCHES = 8, 16, 3, 2
NOMINAL = SAMPLES * LENGTH


def _model() -> nn.Module:
    torch.manual_seed(0)
    # Tied embeddings: one parameter in two places.
    config = ModelConfig(num_layers=2, dim=32, num_heads=2, tie_embeddings=True)
    return build_model(config, sequence_length=LENGTH, num_classes=0, image_shape=None)


def _train(rank: int, world_size: int, strategy: str) -> list[StepRecord]:
    world = World(rank=rank, local_rank=rank, world_size=world_size, device=torch.device("cpu"))
    model = distribute(_model(), ParallelConfig(strategy=strategy), world)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    guard = StepGuard(model, optimizer, max_norm=0.5, per_parameter_every=1, sample_every=1)
    for step in range(STEPS):
        tokens = torch.randint(256, (SAMPLES, LENGTH + 1), generator=torch.Generator().manual_seed(step))
        mine = tokens.chunk(world_size)[rank].chunk(MICRO_BATCHES)
        for index, micro_batch in enumerate(mine):
            last = index == MICRO_BATCHES - 1
            with gradient_sync(model, on=last):
                logits = model(micro_batch[:, :-1]).flatten(0, 1)
                loss = nn.functional.cross_entropy(logits, micro_batch[:, 1:].flatten(), reduction="sum")
                (loss * world_size / NOMINAL).backward()
                guard.accumulate(loss, logits.shape[0], is_last=last)
        guard.step(nominal_tokens=NOMINAL)
        optimizer.zero_grad()
    return guard.drain(wait=True)


@pytest.fixture(scope="module")
def alone() -> list[StepRecord]:
    return _train(0, 1, "auto")


@pytest.mark.parametrize(("strategy", "world_size"), [("ddp", 2), ("fsdp", 2), ("fsdp", 4)])
def test_a_record_does_not_depend_on_how_the_model_is_spread(
    alone: list[StepRecord], strategy: str, world_size: int
) -> None:
    ranks = run_ranks(_train, world_size, strategy)
    assert all(records == ranks[0] for records in ranks)
    for want, have in zip(alone, ranks[0], strict=True):
        assert have.verdict == want.verdict == "clip"
        assert have.num_tokens == want.num_tokens == NOMINAL
        assert have.loss == pytest.approx(want.loss, rel=1e-5)
        assert have.grad_norm == pytest.approx(want.grad_norm, rel=1e-4)
        assert list(have.per_parameter) == list(want.per_parameter)
        for name, row in want.per_parameter.items():
            assert have.per_parameter[name].grad_norm == pytest.approx(row.grad_norm, rel=1e-3)
            assert have.per_parameter[name].num_elements == row.num_elements
        for name, sample in want.sampled.items():
            other = have.sampled[name]
            assert other.weight_norm == pytest.approx(sample.weight_norm, rel=1e-4)
            assert other.update_norm == pytest.approx(sample.update_norm, rel=1e-2)
            assert other.second_moment_max == pytest.approx(sample.second_moment_max, rel=1e-2)
