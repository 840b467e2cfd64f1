"""What docs/integrations.md says of torchtitan's container of optimizers and of distributed checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW, Optimizer

from harness.stability import StepGuard
from tests.support.distributed import run_ranks
from tests.support.guarded import batch, make_model, snapshot, worst_difference

NUM_MICRO_BATCHES = 2


class OptimizersContainer(Optimizer):
    """As torchtitan's: one optimizer for each model part, and itself an Optimizer over all parameters."""

    def __init__(self, model_parts: list[nn.Module], kwargs: dict[str, Any]) -> None:
        self.model_parts = model_parts
        self.optimizers = [
            AdamW([p for p in m.parameters() if p.requires_grad], **kwargs) for m in model_parts
        ]
        super().__init__([p for m in model_parts for p in m.parameters()], kwargs)

    def step(self, *args: Any, **kwargs: Any) -> None:
        for optimizer in self.optimizers:
            optimizer.step(*args, **kwargs)

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(*args, **kwargs)


class _Trainer:
    def __init__(self, *, guarded: bool) -> None:
        model = make_model()
        for layer in (model[0], model[2], model):
            fully_shard(layer)
        self.model_parts: list[nn.Module] = [model]
        self.optimizers = OptimizersContainer(self.model_parts, {"lr": 1e-2, "fused": True})
        self.guard = (
            StepGuard(self.model_parts[0], self.optimizers.optimizers, max_norm=0) if guarded else None
        )

    def forward_backward_step(self, step: int, index: int, rank: int, *, is_bad: bool) -> None:
        inputs, targets = batch(step, rank, index)
        inputs = inputs * (math.nan if is_bad else 1.0)
        loss = nn.functional.mse_loss(self.model_parts[0](inputs), targets)
        (loss / NUM_MICRO_BATCHES).backward()
        if self.guard is not None:
            self.guard.accumulate(loss.detach(), weight=1 / NUM_MICRO_BATCHES)

    def train_step(self, step: int, rank: int, *, bad: tuple[int, int, int] | None = None) -> None:
        self.optimizers.zero_grad()
        for index in range(NUM_MICRO_BATCHES):
            self.forward_backward_step(step, index, rank, is_bad=(step, index, rank) == bad)
        if self.guard is None:
            self.optimizers.step()
        else:
            self.guard.step()

    @property
    def state(self) -> dict[str, Tensor]:
        return snapshot(self.model_parts[0], self.optimizers.optimizers[0])


def _container(rank: int, world_size: int) -> None:
    ours, theirs = _Trainer(guarded=True), _Trainer(guarded=False)
    for step in range(4):
        ours.train_step(step, rank)
        theirs.train_step(step, rank)
    assert worst_difference(ours.state, theirs.state) == ""
    before = {name: value.clone() for name, value in ours.state.items()}
    ours.train_step(4, rank, bad=(4, 1, world_size - 1))
    assert worst_difference(ours.state, before) == ""
    ours.train_step(5, rank)
    assert worst_difference(ours.state, before) != ""
    assert ours.guard is not None
    ours.guard.flush()
    bad = ours.guard.drain()[4]
    assert (bad.verdict, bad.rank, bad.micro_batch) == ("skip", world_size - 1, 1)


def _save(trainer: _Trainer, folder: str) -> None:
    assert trainer.guard is not None
    model, optimizer = get_state_dict(trainer.model_parts[0], trainer.optimizers.optimizers)
    trainer.guard.flush()
    dcp.save({"model": model, "optimizer": optimizer, "guard": trainer.guard}, checkpoint_id=folder)


def _load(trainer: _Trainer, folder: str) -> None:
    model, optimizer = get_state_dict(trainer.model_parts[0], trainer.optimizers.optimizers)
    dcp.load({"model": model, "optimizer": optimizer, "guard": trainer.guard}, checkpoint_id=folder)
    set_state_dict(
        trainer.model_parts[0],
        trainer.optimizers.optimizers,
        model_state_dict=model,
        optim_state_dict=optimizer,
    )


def _checkpointed(rank: int, world_size: int, folder: str) -> None:
    whole, resumed = _Trainer(guarded=True), _Trainer(guarded=True)
    for step in range(3):
        whole.train_step(step, rank, bad=(2, 0, 0))
    _save(whole, folder)
    _load(resumed, folder)
    for step in range(3, 6):
        whole.train_step(step, rank, bad=(4, 0, 0))
        resumed.train_step(step, rank, bad=(4, 0, 0))
    assert worst_difference(whole.state, resumed.state) == ""
    ours, theirs = resumed.guard, whole.guard
    assert ours is not None
    assert theirs is not None
    for guard in (ours, theirs):
        guard.flush()
    assert repr(ours.drain()) == repr(theirs.drain()[3:])
    assert ours.state_dict()["ladder"] == theirs.state_dict()["ladder"]


def _all(rank: int, world_size: int, folder: str) -> None:
    _container(rank, world_size)
    _checkpointed(rank, world_size, folder)


def test_a_container_of_optimizers_and_a_distributed_checkpoint_take_the_guard(tmp_path: Path) -> None:
    run_ranks(_all, 2, str(tmp_path / "checkpoint"))
