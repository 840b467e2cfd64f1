"""Loss on held-out samples: always the same ones, spread over the ranks, without drawing random numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from harness.config import TrainConfig
from harness.data import Task, evaluation_batches
from harness.dist import World, all_reduce_sum, plain
from harness.training.step import autocast

__all__ = ["evaluate"]


def evaluate(
    model: nn.Module, task: Task, config: TrainConfig, world: World, *, precision: str
) -> dict[str, float]:
    """`val/loss` (nats per token), `val/perplexity`, `val/accuracy` and, for text, `val/bits_per_byte`.

    Every rank gets the same numbers. One collective; synchronises with the device.
    """
    # DDP's forward pass would broadcast buffers; FSDP2 needs its own, on every rank equally often.
    network = plain(model)
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)
    with torch.no_grad(), _all_in_eval_mode(network):
        for batch in evaluation_batches(
            task.val_data,
            num_samples=config.loop.eval_samples,
            micro_batch=config.loop.micro_batch or config.loop.global_batch // world.world_size,
            rank=world.rank,
            world_size=world.world_size,
        ):
            batch = {name: tensor.to(world.device) for name, tensor in batch.items()}
            with autocast(world.device, precision):
                loss = task.loss(network, batch)
            sums += torch.stack([loss.total.double(), loss.count.double(), loss.correct.double()])
    total, count, correct = all_reduce_sum(sums).tolist()
    return _metrics(total / count, correct / count, task.bytes_per_token)


def _metrics(loss: float, accuracy: float, bytes_per_token: float | None) -> dict[str, float]:
    metrics = {"val/loss": loss, "val/perplexity": _exp(loss), "val/accuracy": accuracy}
    if bytes_per_token is not None:
        metrics["val/bits_per_byte"] = loss / math.log(2) / bytes_per_token
    return metrics


def _exp(loss: float) -> float:
    """Perplexity; infinite rather than an error where the loss has blown up."""
    return math.exp(loss) if loss < 700 else loss * math.inf


@contextmanager
def _all_in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts every module in eval mode, and back into the mode that each one was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
