"""Time of a training step with each integration's guard against the framework's own clipping and step.

    python scripts/bench_adoption.py [--turns 8] [--steps 20] [--widths 64 512 1024] [--cpu-time]

The two trainings of a framework live in one process and take turns, so that a noisy machine is noisy for
both. A step is from one forward pass to the next; a turn's is the median of its steps, the ratio the median
over turns of guarded / own, and `guard_ms` that of the differences. The model is a stack of linear layers in
fp32 with fused AdamW, always clipped; no log, no checkpoints. One thread: OMP_NUM_THREADS=1. On a machine
that others use `--cpu-time` counts this process's time alone, which with one thread is the wall's on a quiet
one.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import torch
from accelerate import Accelerator
from results import summarise, write_results
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from harness.integrations.accelerate import step_guard
from harness.integrations.lightning import guarded_precision
from harness.integrations.transformers import guarded

MAX_NORM = 0.1
BATCH_SIZE = 64
NUM_LAYERS = 8
NUM_WARMUP_STEPS = 4
"""Of each turn: the optimizer makes its state, and kernels are chosen."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=8, help="of each of the two trainings")
    parser.add_argument("--steps", type=int, default=20, help="in a turn")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 512, 1024], help="of a layer")
    parser.add_argument("--cpu-time", action="store_true", help="processor time instead of the wall's")
    parser.add_argument("--name", default="adoption", help="of the results in docs/benchmarks")
    options = parser.parse_args()
    Net.clock = time.process_time if options.cpu_time else time.perf_counter
    turns = {"accelerate": with_accelerate, "transformers": with_transformers, "lightning": with_lightning}
    rows = {}
    for width in options.widths:
        millions = NUM_LAYERS * width * (width + 1) / 1e6
        for framework, turn in turns.items():
            name = f"{framework}, {millions:.2g} M parameters"
            rows[name] = _compared(turn, options.turns, options.steps, width)
            print(name, rows[name], flush=True)
    clock = "processor time" if options.cpu_time else "wall"
    about = {
        "clock": clock,
        "threads": torch.get_num_threads(),
        "turns": options.turns,
        "steps": options.steps,
    }
    write_results(options.name, rows, device=torch.device("cpu"), about=about)


class Net(nn.Module):
    """Notes when it is called."""

    clock: Callable[[], float] = time.perf_counter

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(*(nn.Linear(width, width) for _ in range(NUM_LAYERS)))
        self.called_s: list[float] = []

    def forward(self, x: Tensor, **_: Any) -> dict[str, Tensor]:
        self.called_s.append(type(self).clock())
        return {"loss": self.body(x).square().mean()}

    def fused_adamw(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4, fused=True)


def with_accelerate(net: Net, data: list[dict[str, Tensor]], *, is_guarded: bool) -> None:
    accelerator = Accelerator(cpu=True)
    model, optimizer, loader = accelerator.prepare(
        net, net.fused_adamw(), DataLoader(data, batch_size=BATCH_SIZE)
    )
    guard = step_guard(accelerator, model, optimizer, max_norm=MAX_NORM) if is_guarded else None
    for batch in loader:
        loss = model(**batch)["loss"]
        accelerator.backward(loss)
        if guard is None:
            accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
        else:
            guard.step(loss)
        optimizer.zero_grad()
    if guard is not None:
        guard.close()


def with_transformers(net: Net, data: list[dict[str, Tensor]], *, is_guarded: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            per_device_train_batch_size=BATCH_SIZE,
            num_train_epochs=1,
            max_grad_norm=MAX_NORM,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            optim="adamw_torch_fused",
        )
        kind = guarded(Trainer) if is_guarded else Trainer
        kind(model=net, args=args, train_dataset=data).train()


class _Module(pl.LightningModule):
    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: dict[str, Tensor], number: int) -> Tensor:
        return self.net(**batch)["loss"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.net.fused_adamw()


def with_lightning(net: Net, data: list[dict[str, Tensor]], *, is_guarded: bool) -> None:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        gradient_clip_val=MAX_NORM,
        plugins=guarded_precision() if is_guarded else None,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(_Module(net), DataLoader(data, batch_size=BATCH_SIZE))


def _compared(turn: Callable[..., None], num_turns: int, num_steps: int, width: int) -> dict[str, Any]:
    data = [{"x": row} for row in torch.randn(BATCH_SIZE * (num_steps + NUM_WARMUP_STEPS + 1), width)]
    step_ms: dict[bool, list[float]] = {False: [], True: []}
    for number in range(num_turns):
        for is_guarded in (False, True) if number % 2 == 0 else (True, False):
            net = Net(width)
            turn(net, data, is_guarded=is_guarded)
            steps_s = [end - start for start, end in pairwise(net.called_s[NUM_WARMUP_STEPS:])]
            step_ms[is_guarded].append(1e3 * statistics.median(steps_s))
    ratios = [ours / own for own, ours in zip(step_ms[False], step_ms[True], strict=True)]
    return {
        "own_ms": summarise(step_ms[False]),
        "guarded_ms": summarise(step_ms[True]),
        "guard_ms": statistics.median(
            ours - own for own, ours in zip(step_ms[False], step_ms[True], strict=True)
        ),
        "guarded_over_own": statistics.median(ratios),
    }


if __name__ == "__main__":
    main()
