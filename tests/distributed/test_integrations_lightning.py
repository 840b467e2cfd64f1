"""Lightning's Trainer with the guard's plugin, against itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from tests.support.distributed import run_ranks
from tests.support.guarded import batch, make_model, snapshot, worst_difference
from tests.support.launched import as_launched, each_alone

pytest.importorskip("lightning", reason="pip install lightning")

NUM_STEPS = 5


def _module(bad: int | None, rank: int, *, sharded: bool = False) -> Any:
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        """Two micro-batches a step, a schedule, a buffer; `bad` is the batch with a NaN on this rank."""

        def __init__(self) -> None:
            super().__init__()
            self.body = make_model()
            self.register_buffer("num_calls", torch.zeros(()))
            self.losses: list[float] = []
            self.states: list[dict[str, Tensor]] = []
            self.norms: list[float] = []

        def training_step(self, index: Tensor, number: int) -> Tensor:
            inputs, targets = batch(number, rank)  # a resumed Trainer begins its loader anew
            self.num_calls += 1
            scale = math.nan if number == bad else 1.0
            loss = nn.functional.mse_loss(self.body(inputs * scale).float(), targets)
            self.losses.append(loss.item())
            return loss

        def configure_model(self) -> None:
            if sharded and not isinstance(self.body, FSDPModule):  # the module itself is a plain one
                fully_shard(self.body, mesh=self.device_mesh["data_parallel"])

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.norms.append(sum(float(p.grad.square().sum()) for p in self.parameters()))

        def on_train_batch_end(self, *args: Any) -> None:
            self.states.append(_state(self, self.trainer.optimizers[0]))

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, fused=True)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return Module()


def _state(module: Any, optimizer: Any) -> dict[str, Tensor]:
    return {**snapshot(module, optimizer), "num_calls": module.num_calls.clone()}


def _fitted(
    folder: str,
    world_size: int,
    rank: int,
    *,
    plugin: Any = None,
    bad: int | None = None,
    resume: str | None = None,
    sharded: bool = False,
    **settings: Any,
) -> tuple[Any, Any]:
    import lightning.pytorch as pl
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    module = _module(bad, rank, sharded=sharded)
    strategy: Any = "auto"
    if sharded:
        strategy = ModelParallelStrategy(world_size, 1, process_group_backend="gloo")
    elif world_size > 1:
        strategy = DDPStrategy(process_group_backend="gloo", broadcast_buffers=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=strategy,
        plugins=plugin,
        default_root_dir=folder,
        max_epochs=1,
        limit_train_batches=2 * NUM_STEPS,
        **{
            "accumulate_grad_batches": 2,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **settings,
        },
    )
    loader = torch.utils.data.DataLoader(torch.arange(2 * NUM_STEPS * world_size), batch_size=1)
    trainer.fit(module, loader, ckpt_path=resume)
    return trainer, module


def _clean(folder: str, world_size: int, rank: int) -> None:
    from harness.integrations.lightning import GuardCallback, guarded_precision

    for precision, settings in (
        ("32-true", {"gradient_clip_val": 0.0}),
        ("bf16-mixed", {"accumulate_grad_batches": 1}),
    ):
        callback = GuardCallback()
        plugin = guarded_precision(precision)
        ours, mine = _fitted(folder, world_size, rank, plugin=plugin, callbacks=[callback], **settings)
        theirs, other = _fitted(folder, world_size, rank, precision=precision, **settings)
        assert mine.losses == other.losses
        assert ours.global_step == theirs.global_step
        assert worst_difference(mine.states[-1], other.states[-1]) == ""
        assert (callback.num_skipped, plugin.guard) == (0, None)


def _clipped(folder: str, world_size: int, rank: int) -> None:
    from harness.integrations.lightning import guarded_precision

    mine = _fitted(folder, world_size, rank, plugin=guarded_precision(), gradient_clip_val=0.05)[1]
    other = _fitted(folder, world_size, rank, gradient_clip_val=0.05)[1]
    for name, value in other.states[-1].items():
        torch.testing.assert_close(mine.states[-1][name], value, rtol=1e-4, atol=1e-6)


def _bad(folder: str, world_size: int, rank: int) -> None:
    from harness.integrations.lightning import GuardCallback, guarded_precision

    incidents: list[Any] = []
    plugin = guarded_precision(on_incident=incidents.append)
    bad = 3 if rank == world_size - 1 else None  # the second micro-batch of step 1
    callback = GuardCallback()
    trainer, module = _fitted(folder, world_size, rank, plugin=plugin, bad=bad, callbacks=[callback])
    before, after = module.states[1], module.states[3]
    assert worst_difference(before, after) == ""
    assert worst_difference(after, module.states[5]) != ""
    assert callback.num_skipped == 1
    (incident,) = incidents
    assert (incident.step, incident.rank, incident.micro_batch) == (1, world_size - 1, 1)
    assert trainer.global_step == NUM_STEPS
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == NUM_STEPS


def _resumed(folder: str, world_size: int, rank: int) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    from harness.integrations.lightning import guarded_precision

    keep = {"enable_checkpointing": True}
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    whole = _fitted(folder, world_size, rank, plugin=guarded_precision(), callbacks=[saver], **keep)[1]
    plugin = guarded_precision()
    path = f"{folder}/step=2.ckpt"
    resumed = _fitted(folder, world_size, rank, plugin=plugin, resume=path, **keep)[1]
    assert worst_difference(whole.states[-1], resumed.states[-1]) == ""
    assert whole.losses[4:] == resumed.losses
    saved = torch.load(path, weights_only=True)[type(plugin).__qualname__]
    assert saved["guard"]["step"] == 2


def _sharded(folder: str, world_size: int, rank: int) -> None:
    from harness.integrations.lightning import guarded_precision

    mine = _fitted(folder, world_size, rank, plugin=guarded_precision(), sharded=True)[1]
    other = _fitted(folder, world_size, rank, sharded=True)[1]
    assert worst_difference(mine.states[-1], other.states[-1]) == ""
    incidents: list[Any] = []
    plugin = guarded_precision(on_incident=incidents.append)
    bad = 3 if rank == world_size - 1 else None
    module = _fitted(folder, world_size, rank, plugin=plugin, bad=bad, sharded=True)[1]
    assert [(one.step, one.rank, one.micro_batch) for one in incidents] == [(1, world_size - 1, 1)]
    assert worst_difference(module.states[1], module.states[3]) == ""


def _in_half_precision(folder: str, world_size: int, rank: int) -> None:
    """With Lightning's own GradScaler, which takes its scale out before the hooks look at gradients."""
    from lightning.pytorch.plugins import MixedPrecision

    from harness.integrations.lightning import guarded_precision

    scalers = [torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2) for _ in range(2)]
    ours, theirs = guarded_precision("16-mixed"), MixedPrecision("16-mixed", "cpu", scalers[1])
    ours.scaler = scalers[0]
    mine = _fitted(folder, world_size, rank, plugin=ours)[1]
    other = _fitted(folder, world_size, rank, plugin=theirs)[1]
    assert worst_difference(mine.states[-1], other.states[-1]) == ""
    assert mine.norms == other.norms
    assert scalers[0].get_scale() == scalers[1].get_scale() > 256.0


def _refused(folder: str, world_size: int, rank: int) -> None:
    from harness.errors import ConfigError
    from harness.integrations.lightning import guarded_precision

    with pytest.raises(ConfigError, match="gradient_clip_algorithm='value' with the guard"):
        _fitted(
            folder, world_size, rank, plugin=guarded_precision(), gradient_clip_algorithm="value",
            gradient_clip_val=1.0,
        )  # fmt: skip
    with pytest.raises(ConfigError, match="one place"):
        guarded_precision(max_norm=1.0)
    with pytest.raises(ConfigError, match="precision='64-true'"):
        guarded_precision("64-true")
    with pytest.raises(ConfigError, match="device='cuda' for the precision of a model on cpu"):
        _fitted(folder, world_size, rank, plugin=guarded_precision("bf16-mixed", device="cuda"))


def _all(rank: int, world_size: int, folder: str) -> None:
    as_launched(world_size)
    for case in (_clean, _clipped, _bad, _resumed, _sharded, _in_half_precision):
        case(folder, world_size, rank)
    each_alone()
    for case in (_clean, _bad, _resumed, _refused):
        case(f"{folder}/{rank}", 1, 0)


def test_lightnings_trainer_is_the_same_and_guarded_on_two_ranks_and_on_one(tmp_path: Path) -> None:
    run_ranks(_all, 2, str(tmp_path), timeout_s=120)
