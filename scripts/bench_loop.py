"""Tokens per second of the harness's loop against the barest loop for the same model on the same data.

    python scripts/bench_loop.py [--segments 12] [--steps 20] [-- --any.setting value]

Both loops live in one process and take turns, segment by segment, so that a noisy machine is noisy for both.
The harness runs with everything on: guard, log, histograms, mirrors in TensorBoard and W&B (offline),
checkpoints. Evaluation is off in both.
The ratio is the median over turns of bare time / harness time; the figures go to docs/benchmarks/NAME.*.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable

import torch
from results import summarise, write_results
from torch import nn

from harness.config import TrainConfig, parse_arguments
from harness.data import Loader, Task
from harness.dist import open_world
from harness.stop import StopRequest
from harness.training.build import build_run
from harness.training.loop import train_step
from harness.training.optim import set_learning_rate
from harness.training.precision import autocast
from harness.training.schedule import learning_rate
from harness.training.summary import Ending
from harness.training.tasks import build_task


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--segments", type=int, default=12, help="turns of each loop")
    parser.add_argument("--steps", type=int, default=20, help="steps in a turn")
    parser.add_argument("--name", default="loop", help="of the results in docs/benchmarks")
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
                "--tracking.progress=lines",
                "--tracking.wandb=offline",
            ]
        )
        measure(config, options.segments, options.steps, name=options.name)


def measure(config: TrainConfig, segments: int, steps: int, *, name: str) -> None:
    with open_world(config.parallel) as world, StopRequest() as stop:
        run = build_run(config, world, stop)
        bare_step = bare_loop(config, build_task(config), world.device, run.precision)
        times: dict[str, list[float]] = {"bare": [], "harness": []}
        for turn in range(segments + 1):
            for loop, step in (("bare", bare_step), ("harness", lambda: train_step(run))):
                seconds = timed(step, steps, world.device)
                if turn:  # the first turn warms up
                    times[loop].append(seconds / steps)
        run.checkpointer.close()
        run.journal.close(Ending(status="stopped"))
    tokens = config.loop.global_batch * config.data.sequence_length
    ratios = [bare / ours for bare, ours in zip(times["bare"], times["harness"], strict=True)]
    rows = {
        loop: {"step_s": summarise(values), "tokens_per_s": tokens / summarise(values)["p50"]}
        for loop, values in times.items()
    }
    rows["harness"]["speed_over_bare"] = summarise(ratios)["p50"]
    write_results(name, rows, device=world.device, about={"tokens_per_step": tokens, "steps_per_turn": steps})


def bare_loop(config: TrainConfig, task: Task, device: torch.device, precision: str) -> Callable[[], None]:
    """One step of the loop that one would write by hand: no clipping, no monitor, no log."""
    model: nn.Module = copy.deepcopy(task.model).to(device)
    if config.loop.compile:
        model.compile()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.optim.lr, betas=config.optim.betas, weight_decay=0.1, fused=True
    )
    loader = Loader(task.train_data, global_batch=config.loop.global_batch, seed=config.seed)
    position = 0

    def step() -> None:
        nonlocal position
        lr = learning_rate(
            position, peak=config.optim.lr, num_steps=config.loop.steps, schedule=config.schedule
        )
        set_learning_rate([optimizer], lr)
        position += 1
        (batch,) = loader.next()
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        with autocast(device, precision):
            loss = task.loss(model, batch)
        (loss.total / (config.loop.global_batch * config.data.sequence_length)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def timed(step: Callable[[], object], steps: int, device: torch.device) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
