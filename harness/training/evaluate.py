"""Loss on held-out samples: always the same ones, spread over the ranks. It reads, and changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from harness.checkpoint import Rng
from harness.config import TrainConfig
from harness.data import LossSum, Task, evaluation_batches, run_loss, seed_everything, to_device
from harness.dist import World, all_reduce_sum, plain
from harness.errors import ConfigError
from harness.runlog.names import Metric
from harness.training.buffers import buffers_of_rank_0, constant_buffers
from harness.training.precision import autocast

__all__ = ["evaluate", "rehearse"]


def evaluate(
    model: nn.Module,
    task: Task,
    config: TrainConfig,
    world: World,
    *,
    precision: str,
    num_samples: int | None = None,
    in_training_mode: bool = False,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """`val/loss` (nats per token), `val/perplexity`, `val/accuracy` and, for text, `val/bits_per_byte`; of
    a task with parts `val/loss/PART` of each that has a sample among those.

    The metrics are those of the model that a checkpoint of this moment holds: buffers that differ between
    ranks are rank 0's, unless they are too large to be copied. What the forward pass draws depends on the
    seed and the rank alone. Generators, buffers and modes are left as they were. NaN where no token counts.

    Args:
        num_samples: How many, over all ranks; default: `loop.eval_samples`.
        in_training_mode: For a comparison; generators and buffers are put back as ever.
        interrupted: Asked before each batch: whether to leave off; on all ranks equally often and alike.

    Returns:
        The same numbers on every rank; None if it was interrupted. A few collectives; synchronises with the
        device.

    Raises:
        ConfigError: the forward pass or the loss changes parameters, or buffers too large to be copied.
    """
    # DDP's forward pass would broadcast buffers; FSDP2 needs its own, on every rank equally often.
    network = plain(model)
    sums = torch.zeros(3 + 2 * len(task.parts), dtype=torch.float64, device=world.device)
    with torch.no_grad(), _reading_only(network, seed=config.seed + world.rank, mode=in_training_mode):
        for batch, counts in evaluation_batches(
            task.val_data,
            num_samples=num_samples or config.loop.eval_samples,
            micro_batch=config.loop.micro_batch or config.loop.global_batch // world.world_size,
            rank=world.rank,
            world_size=world.world_size,
        ):
            if interrupted():
                return None
            with autocast(world.device, precision):
                loss = run_loss(task, network, to_device(batch, world.device))
            if counts:
                _add(sums, loss)
    total, count, correct, *by_part = all_reduce_sum(sums).tolist()
    metrics = _metrics(_ratio(total, count), _ratio(correct, count), task.bytes_per_token)
    of_parts = zip(task.parts, by_part[::2], by_part[1::2], strict=True)
    return metrics | {
        f"{Metric.VAL_LOSS}/{name}": part_total / part_count
        for name, part_total, part_count in of_parts
        if part_count
    }


def rehearse(model: nn.Module, task: Task, config: TrainConfig, world: World, *, precision: str) -> None:
    """Evaluates one micro-batch per rank, uncompiled: what is wrong with held-out data or loss is said before
    the first step and not after `loop.eval_every` of them."""
    micro_batch = config.loop.micro_batch or config.loop.global_batch // world.world_size
    eager = torch.compiler.set_stance("force_eager") if config.loop.compile else nullcontext()
    with eager:
        evaluate(model, task, config, world, precision=precision, num_samples=micro_batch * world.world_size)


def _add(sums: Tensor, loss: LossSum) -> None:
    # One by one: a count may lie on the host, as a number or as a tensor, and is then sent without waiting.
    for place, value in zip(sums[:3], (loss.total, loss.count, loss.correct), strict=True):
        place.add_(value)
    if loss.by_part is not None:
        sums[3:].add_(loss.by_part.flatten())


def _ratio(total: float, count: float) -> float:
    return total / count if count else math.nan


def _metrics(loss: float, accuracy: float, bytes_per_token: float | None) -> dict[str, float]:
    metrics = {Metric.VAL_LOSS: loss, Metric.VAL_PERPLEXITY: _exp(loss), Metric.VAL_ACCURACY: accuracy}
    if bytes_per_token is not None:
        metrics[Metric.VAL_BITS_PER_BYTE] = loss / math.log(2) / bytes_per_token
    return metrics


def _exp(loss: float) -> float:
    """Perplexity; infinite rather than an error where the loss has blown up."""
    return math.exp(loss) if loss < 700 else loss * math.inf


@contextmanager
def _reading_only(model: nn.Module, *, seed: int, mode: bool) -> Iterator[None]:
    """Within it the model is as a checkpoint holds it, in eval mode unless `mode`, and all generators are
    seeded. Afterwards generators, buffers and every module's mode are as before."""
    generators = Rng()
    before = generators.state_dict()
    seed_everything(seed)
    try:
        with _all_in_one_mode(model, mode), _untouched(model), buffers_of_rank_0(model):
            yield
    finally:
        generators.load_state_dict(before)


@contextmanager
def _all_in_one_mode(model: nn.Module, mode: bool) -> Iterator[None]:
    """Puts every module in training mode or in eval mode, and back into the mode that each one was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(mode)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Raises `ConfigError` if a parameter, or a buffer too large to be copied, is written to within it; host
    work only."""
    # The objects are kept: FSDP2 puts others in their place while a module is gathered.
    named: list[tuple[str, Tensor]] = [
        (f"parameter {name}", tensor) for name, tensor in model.named_parameters()
    ]
    named += [(f"buffer {name}", tensor) for name, tensor in constant_buffers(model).items()]
    before = [(what, tensor, tensor._version) for what, tensor in named]
    yield
    changed = [what for what, tensor, version in before if tensor._version != version]
    if changed:
        raise ConfigError(
            f"evaluation changed the {changed[0]}",
            rule="in eval mode the loss and the model's forward pass leave alone parameters, and buffers of"
            " more than 1 GiB in all",
            remedy="change it under `if model.training:`",
        )
