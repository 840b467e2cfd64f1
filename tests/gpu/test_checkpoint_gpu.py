"""What of checkpoints only a GPU can show: pinned staging, and training that goes on over it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from harness.checkpoint import Checkpointer, Rng
from harness.errors import CheckpointError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def make(seed: int = 0) -> dict[str, object]:
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(16))).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    return {"model": model, "optimizer": optimizer, "rng": Rng()}


def train(state: dict[str, object], num_steps: int) -> None:
    model, optimizer = state["model"], state["optimizer"]
    assert isinstance(model, nn.Module)
    assert isinstance(optimizer, torch.optim.Optimizer)
    for _ in range(num_steps):
        nn.functional.dropout(model(torch.randn(8, 512, device="cuda")), 0.3).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def bits(state: dict[str, object]) -> list[torch.Tensor]:
    model, optimizer = state["model"], state["optimizer"]
    assert isinstance(model, nn.Module)
    assert isinstance(optimizer, torch.optim.Optimizer)
    moments = [value for values in optimizer.state.values() for value in values.values()]
    tensors = [*model.parameters(), *moments, torch.cuda.get_rng_state()]
    return [tensor.detach().cpu().clone() for tensor in tensors]


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_save_holds_the_state_of_the_call_though_kernels_go_on_writing(
    tmp_path: Path, in_memory: bool
) -> None:
    state = make()
    train(state, 2)
    with Checkpointer(tmp_path, in_memory=in_memory) as checkpointer:
        for step in (2, 4):
            expected = bits(state)
            checkpointer.save(step, state)
            train(state, 20)
            checkpointer.wait()
        resumed = make(seed=1)
        assert checkpointer.load(resumed) == 4
    for left, right in zip(expected, bits(resumed), strict=True):
        assert left.equal(right)


def test_staging_is_pinned_and_reused(tmp_path: Path) -> None:
    state = make()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        checkpointer.wait()
        first = checkpointer._staging.data
        checkpointer.save(2, state)
        checkpointer.wait()
        assert first.is_pinned()
        assert checkpointer._staging.data.data_ptr() == first.data_ptr()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_non_finite_state_on_the_gpu_is_never_committed(tmp_path: Path, poison: float) -> None:
    state = make()
    model = state["model"]
    assert isinstance(model, nn.Module)
    with torch.no_grad():
        next(model.parameters()).view(-1)[77] = poison
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        with pytest.raises(CheckpointError, match=r"0\.weight holds NaN or infinite values"):
            checkpointer.wait()
        assert checkpointer.steps() == []
