"""Tokens per second of `harness train` and of what people would take instead, for the same model.

    python scripts/bench_trainers.py [--turns 6] [--steps 20] [-- --any.setting value]

transformers' Trainer, Lightning's Trainer, a loop as nanoGPT's, and the harness with everything on (guard,
log, histograms, mirrors in TensorBoard and W&B offline, checkpoints) live in one process and take turns, so
that a noisy machine is noisy for all. All clip, all use fused AdamW, the same precision, data and
micro-batches; the others log and save nothing. A turn's time is from the end of its fourth step to the end of
its last; the speed is the median over turns of the harness's time over that of each. MFU where the device's
peak is known.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from results import summarise, write_results
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from harness.config import TrainConfig, parse_arguments
from harness.data import Batch, Task, fetch, to_device
from harness.dist import open_world
from harness.stop import StopRequest
from harness.training.build import build_run
from harness.training.loop import Run, train_step
from harness.training.precision import autocast
from harness.training.summary import Ending
from harness.training.tasks import build_task
from harness.training.utilisation import peak_flops

MAX_NORM = 1.0
NUM_WARMUP_STEPS = 4
"""Of each turn: trainers start anew, the optimizer makes its state, kernels are chosen."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=6, help="of each trainer")
    parser.add_argument("--steps", type=int, default=20, help="in a turn")
    parser.add_argument("--name", default="trainers", help="of the results in docs/benchmarks")
    parser.add_argument("settings", nargs="*", help="settings of the run, as for harness train")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = parse_arguments(
            [
                *options.settings,
                f"--runs_dir={folder}",
                "--name=bench",
                "--loop.steps=1000000",
                "--loop.eval_every=0",
                "--checkpoint.every=100",
                "--tracking.progress=off",
                "--tracking.wandb=offline",
            ]
        )
        measure(config, options.turns, options.steps, name=options.name)


def measure(config: TrainConfig, turns: int, steps: int, *, name: str) -> None:
    with open_world(config.parallel) as world, StopRequest() as stop:
        run = build_run(config, world, stop)
        others = [kind(Setting.of(config, run)) for kind in (BareLoop, HuggingFace, Lightning)]
        times: dict[str, list[float]] = {}
        for turn in range(turns + 1):
            for trainer in (Harness(run), *others):
                seconds = trainer.turn(NUM_WARMUP_STEPS + steps) / steps
                if turn:  # the first one warms up: compilation
                    times.setdefault(trainer.name, []).append(seconds)
        run.checkpointer.close()
        run.journal.close(Ending(status="stopped"))
    tokens = config.loop.global_batch * run.task.tokens_per_sample
    flops, peak = run.task.flops_per_token, peak_flops(world.device)
    rows: dict[str, dict[str, Any]] = {}
    for trainer, seconds in times.items():
        speed = tokens / summarise(seconds)["p50"]
        ratios = [ours / other for ours, other in zip(times[Harness.name], seconds, strict=True)]
        rows[trainer] = {
            "step_s": summarise(seconds),
            "tokens_per_s": speed,
            "speed_over_harness": summarise(ratios)["p50"],
            "mfu": speed * flops / peak if flops and peak else None,
        }
    write_results(
        name,
        rows,
        device=world.device,
        about={"tokens_per_step": tokens, "steps_per_turn": steps, "precision": run.precision},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all trainers are given."""

    task: Task
    device: torch.device
    precision: str
    lr: float
    betas: tuple[float, float]
    weight_decay: float
    micro_batch: int
    num_passes: int
    compile: bool

    @classmethod
    def of(cls, config: TrainConfig, run: Run) -> Setting:
        shares = run.loader.shares
        return cls(
            task=build_task(config),
            device=run.world.device,
            precision=run.precision,
            lr=config.optim.lr,
            betas=config.optim.betas,
            weight_decay=config.optim.weight_decay,
            micro_batch=shares.micro_batch,
            num_passes=shares.num_passes,
            compile=bool(config.loop.compile),
        )

    def model(self) -> WithLoss:
        """A model of its own."""
        model = WithLoss(copy.deepcopy(self.task.model), self.task).to(self.device)
        if self.compile:
            model.model.compile()
        return model

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Fused AdamW."""
        return torch.optim.AdamW(
            model.parameters(), lr=self.lr, betas=self.betas, weight_decay=self.weight_decay, fused=True
        )

    def batches(self, num_steps: int) -> DataLoader[Batch]:
        """Micro-batches on the host, shuffled."""
        samples = _Samples(self.task, num_steps * self.num_passes * self.micro_batch)
        pin = self.device.type == "cuda"
        return DataLoader(
            samples, batch_size=self.micro_batch, shuffle=True, pin_memory=pin, collate_fn=samples.collate
        )


class _Samples(torch.utils.data.Dataset[int]):
    def __init__(self, task: Task, num_samples: int) -> None:
        self._data = task.train_data
        self._num_samples = num_samples

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> int:
        return index % len(self._data)

    def collate(self, indices: list[int]) -> Batch:
        return fetch(self._data, indices)


class WithLoss(nn.Module):
    """Called with a micro-batch it returns the mean loss, as trainers want it."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model = model
        self._task = task

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        loss = self._task.loss(self.model, batch)
        return {"loss": loss.total / loss.count}


@dataclass(slots=True)
class Watch:
    """When the last warm-up step and the last step of a turn ended."""

    device: torch.device
    last: int
    at: list[float] = field(default_factory=list)
    num_steps: int = 0

    def step(self) -> None:
        """An optimizer step was launched."""
        self.num_steps += 1
        if self.num_steps in (NUM_WARMUP_STEPS, self.last):
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.at.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        first, last = self.at
        return last - first


class Harness:
    name = "harness"

    def __init__(self, run: Run) -> None:
        self._run = run

    def turn(self, num_steps: int) -> float:
        watch = Watch(self._run.world.device, num_steps)
        for _ in range(num_steps):
            train_step(self._run)
            watch.step()
        return watch.seconds


class BareLoop:
    """nanoGPT's: autocast, accumulation, clipping, a read of the loss every ten steps."""

    name = "a loop as nanoGPT's"

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._model = setting.model()
        self._optimizer = setting.optimizer(self._model)
        self._scaler = torch.amp.GradScaler(setting.device.type, enabled=setting.precision == "fp16")

    def turn(self, num_steps: int) -> float:
        setting, watch = self._setting, Watch(self._setting.device, num_steps)
        batches = iter(setting.batches(num_steps))
        for step in range(num_steps):
            for _ in range(setting.num_passes):
                batch = to_device(next(batches), setting.device)
                with autocast(setting.device, setting.precision):
                    loss = self._model(**batch)["loss"] / setting.num_passes
                self._scaler.scale(loss).backward()
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self._model.parameters(), MAX_NORM)
            self._scaler.step(self._optimizer)
            self._scaler.update()
            self._optimizer.zero_grad(set_to_none=True)
            if step % 10 == 9:
                loss.item()
            watch.step()
        return watch.seconds


class _WatchCallback(TrainerCallback):
    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._watch.step()


class _OurData(Trainer):
    """Trainer, on the batches that all are given."""

    setting: Setting

    def get_train_dataloader(self) -> DataLoader[Any]:
        return self.accelerator.prepare(self.setting.batches(self.args.max_steps))


class HuggingFace:
    name = "transformers' Trainer"

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._model = setting.model()

    def turn(self, num_steps: int) -> float:
        setting, watch = self._setting, Watch(self._setting.device, num_steps)
        with tempfile.TemporaryDirectory() as folder:
            args = TrainingArguments(
                folder,
                per_device_train_batch_size=setting.micro_batch,
                gradient_accumulation_steps=setting.num_passes,
                max_steps=num_steps,
                max_grad_norm=MAX_NORM,
                bf16=setting.precision == "bf16",
                fp16=setting.precision == "fp16",
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                use_cpu=setting.device.type == "cpu",
                disable_tqdm=True,
            )
            trainer = _OurData(
                model=self._model,
                args=args,
                callbacks=[_WatchCallback(watch)],
                optimizers=(setting.optimizer(self._model), None),
            )
            trainer.setting = setting
            trainer.train()
        return watch.seconds


class _Module(pl.LightningModule):
    def __init__(self, model: WithLoss, setting: Setting, watch: Watch) -> None:
        super().__init__()
        self.model = model
        self._setting = setting
        self._watch = watch

    def training_step(self, batch: Batch, _: int) -> Tensor:
        return self.model(**batch)["loss"]

    def on_train_batch_end(self, *_: Any) -> None:
        if self.trainer.fit_loop._should_accumulate():
            return
        self._watch.step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self._setting.optimizer(self.model)


class Lightning:
    name = "Lightning's Trainer"

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._model = setting.model()

    def turn(self, num_steps: int) -> float:
        setting, watch = self._setting, Watch(self._setting.device, num_steps)
        trainer = pl.Trainer(
            accelerator=setting.device.type,
            devices=1,
            max_steps=num_steps,
            precision={"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}[setting.precision],
            accumulate_grad_batches=setting.num_passes,
            gradient_clip_val=MAX_NORM,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(_Module(self._model, setting, watch), setting.batches(num_steps))
        return watch.seconds


if __name__ == "__main__":
    main()
