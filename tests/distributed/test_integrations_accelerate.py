"""The guard in a loop of accelerate, against the same loop with accelerate's own step."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.errors import ConfigError
from harness.records import StepRecord
from harness.stability import StepGuard
from tests.support.distributed import run_ranks
from tests.support.guarded import batch, make_model, snapshot, worst_difference
from tests.support.launched import as_launched, each_alone, forget_accelerators

NUM_MICRO_BATCHES = 2
NUM_STEPS = 6


class _Net(nn.Module):
    """With a buffer that a forward pass changes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.body(inputs)
        return out


class _Loop:
    """A training with accelerate: two micro-batches a step, a schedule, a checkpoint if asked for."""

    def __init__(
        self,
        *,
        guarded: bool,
        fused: bool = True,
        model: Callable[[], nn.Module] = _Net,
        told: dict[str, Any] | None = None,
        scale: float | None = None,
        **settings: Any,
    ) -> None:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration

        from harness.integrations.accelerate import step_guard

        kwargs = DistributedDataParallelKwargs(broadcast_buffers=False)
        project = ProjectConfiguration(automatic_checkpoint_naming=False)
        self.accelerator = Accelerator(
            cpu=True,
            gradient_accumulation_steps=NUM_MICRO_BATCHES,
            kwargs_handlers=[kwargs],
            project_config=project,
            **(told or {}),
        )
        if scale is not None:  # accelerate makes one only where there is a GPU
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
        net = model()
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2, fused=fused)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(net, optimizer, schedule)
        self.guard: StepGuard | None = None
        if guarded:
            self.guard = step_guard(self.accelerator, self.model, self.optimizer, max_norm=0, **settings)

    def run(self, first: int, last: int, *, bad: tuple[int, int, int] | None = None) -> list[float]:
        """Steps `first` to `last`; `bad` is step, micro-batch and rank of a NaN in the inputs."""
        rank, losses = self.accelerator.process_index, []
        for step in range(first, last):
            for index in range(NUM_MICRO_BATCHES):
                inputs, targets = batch(step, rank, index)
                inputs = inputs * (math.nan if (step, index, rank) == bad else 1.0)
                with self.accelerator.accumulate(self.model):
                    loss = nn.functional.mse_loss(self.model(inputs), targets)
                    self.accelerator.backward(loss)
                    if self.guard is None:
                        self.optimizer.step()
                    else:
                        self.guard.step(loss)
                    self.schedule.step()
                    self.optimizer.zero_grad()
                losses.append(loss.item())
        return losses

    @property
    def state(self) -> dict[str, Tensor]:
        model = self.accelerator.unwrap_model(self.model)
        lr = torch.tensor(self.optimizer.param_groups[0]["lr"])
        values = snapshot(model, self.optimizer.optimizer)
        return {**values, **dict(model.named_buffers()), "lr": lr}

    def end(self) -> list[StepRecord]:
        assert self.guard is not None
        self.guard.flush()
        records = self.guard.drain()
        self.guard.close()
        return records


def _clean(rank: int, world_size: int) -> None:
    for fused in (True, False):
        ours, theirs = _Loop(guarded=True, fused=fused), _Loop(guarded=False, fused=fused)
        assert ours.run(0, NUM_STEPS) == theirs.run(0, NUM_STEPS)
        assert worst_difference(ours.state, theirs.state) == ""
        records = ours.end()
        assert [r.step for r in records] == list(range(NUM_STEPS))
        assert {r.verdict for r in records} == {"apply"}
        reference = _Loop(guarded=False, fused=fused).run(0, 1)
        assert records[0].per_rank[rank].loss == pytest.approx(sum(reference) / 2)


def _bad(rank: int, world_size: int) -> None:
    loop = _Loop(guarded=True)
    loop.run(0, 2)
    before = {name: value.clone() for name, value in loop.state.items()}
    loop.run(2, 3, bad=(2, 1, world_size - 1))
    after = {**loop.state, "lr": before["lr"]}  # the schedule goes on
    assert worst_difference(before, after) == ""
    losses = loop.run(3, NUM_STEPS)
    assert all(map(math.isfinite, losses))
    bad = loop.end()[2]
    assert (bad.verdict, bad.rank, bad.micro_batch) == ("skip", world_size - 1, 1)
    assert loop.schedule.scheduler.last_epoch == NUM_STEPS * world_size  # as accelerate counts


def _resumed(rank: int, world_size: int, folder: str) -> None:
    whole = _Loop(guarded=True)
    whole.run(0, 3, bad=(1, 0, 0))
    whole.accelerator.save_state(folder)
    whole.run(3, NUM_STEPS, bad=(4, 0, 0))
    resumed = _Loop(guarded=True)
    resumed.accelerator.load_state(folder)
    resumed.run(3, NUM_STEPS, bad=(4, 0, 0))
    if rank == 0:  # accelerate saves rank 0's buffers for all
        assert worst_difference(whole.state, resumed.state) == ""
    else:
        for mine, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(mine, other)
    ours, theirs = resumed.guard, whole.guard
    assert ours is not None
    assert theirs is not None
    records = resumed.end()
    assert [r.step for r in records] == [3, 4, 5]
    assert repr(records) == repr(whole.end()[3:])
    assert ours.state_dict()["ladder"] == theirs.state_dict()["ladder"]


def _with_adapters() -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(1)
    settings = LoraConfig(r=2, target_modules=["0", "2"], lora_dropout=0.0)
    model: nn.Module = inject_adapter_in_model(settings, make_model())
    return model


def _under_fsdp2(rank: int, world_size: int) -> None:
    from accelerate.utils import FullyShardedDataParallelPlugin

    def looped(*, guarded: bool, checkpointing: bool = False, bad: Any = None, **changes: Any) -> _Loop:
        forget_accelerators()
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Linear"],
            activation_checkpointing=checkpointing,
        )
        loop = _Loop(guarded=guarded, told={"fsdp_plugin": plugin}, **changes)
        loop.run(0, 3, bad=bad)
        return loop

    for changes in (
        {"scale": 1024.0},
        {"checkpointing": True, "model": make_model},  # after a loop with a scaler, whose object is there yet
        {"model": _with_adapters},
    ):
        ours, theirs = looped(guarded=True, **changes), looped(guarded=False, **changes)
        assert worst_difference(ours.state, theirs.state) == ""
        assert {record.verdict for record in ours.end()} == {"apply"}
        scalers = ours.accelerator.scaler, theirs.accelerator.scaler
        assert scalers == (None, None) or scalers[0].get_scale() == scalers[1].get_scale() == 2048.0
    loop = looped(guarded=True, scale=1024.0, bad=(1, 1, world_size - 1))
    bad = loop.end()[1]
    assert (bad.verdict, bad.rank, bad.micro_batch) == ("skip", world_size - 1, 1)
    assert all(value.isfinite().all() for value in loop.state.values())
    forget_accelerators()


def _all(rank: int, world_size: int, folder: str) -> None:
    as_launched(world_size)
    _cases(rank, world_size, folder)
    _under_fsdp2(rank, world_size)
    each_alone()
    _cases(0, 1, f"{folder}/{rank}")


def _cases(rank: int, world_size: int, folder: str) -> None:
    _clean(rank, world_size)
    _bad(rank, world_size)
    _resumed(rank, world_size, folder)


def test_a_loop_of_accelerate_is_the_same_and_guarded_on_two_ranks_and_on_one(tmp_path: Path) -> None:
    run_ranks(_all, 2, str(tmp_path), timeout_s=120)


def _refused(rank: int, world_size: int) -> None:
    as_launched(world_size)
    from accelerate import Accelerator

    from harness.integrations.accelerate import step_guard

    accelerator = Accelerator(cpu=True)
    model = _Net()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ConfigError, match="accelerate has not prepared: AdamW"):
        step_guard(accelerator, model, optimizer)
    prepared = accelerator.prepare(optimizer)
    with pytest.raises(ConfigError, match="a plain _Net on 2 processes"):
        step_guard(accelerator, model, prepared)


def test_what_was_not_prepared_is_refused() -> None:
    run_ranks(_refused, 2)
