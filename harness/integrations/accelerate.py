"""The guard in a loop of Hugging Face Accelerate. Tested with accelerate 1.15.

    guard = step_guard(accelerator, model, optimizer, max_norm=1.0)
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(batch)
            accelerator.backward(loss)
            guard.step(loss)          # in place of accelerator.clip_grad_norm_ and optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

What it cannot see: the batches that `accelerator.gather_for_metrics` drops, losses that were never handed to
`guard.step`, and skipped steps in `accelerator.optimizer_step_was_skipped`, which stays False: a schedule
goes on with every step, skipped ones too, so it is a function of the step's number on every rank and after a
resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from harness.errors import ConfigError
from harness.stability import StepGuard
from harness.wrappers import uncompiled

__all__ = ["refuse_unfit", "step_guard"]

KINDS = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP")
"""Accelerate's ways of spreading a model in which gradients and optimizer are torch's own."""


def step_guard(accelerator: Any, model: nn.Module, optimizer: Any, **settings: Any) -> StepGuard:
    """A `StepGuard` for what `accelerator.prepare` has returned.

    It steps when accelerate's accumulation says so, follows its GradScaler, and its state is in `save_state`
    and `load_state`, which wait for the steps in flight.

    Args:
        accelerator: An `accelerate.Accelerator`.
        model: As prepared: plain, DDP or FSDP2, compiled or not.
        optimizer: One or several, as prepared.
        settings: `StepGuard`'s.

    Raises:
        ConfigError: model or optimizer were not prepared; DeepSpeed, Megatron-LM, FSDP1 or XLA; what
            `StepGuard` refuses.
    """
    refuse_unfit(accelerator)
    several = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
    if not all(hasattr(one, "gradient_state") for one in several):
        raise ConfigError(
            f"an optimizer that accelerate has not prepared: {type(several[0]).__name__}",
            rule="accelerate says when a step is made, by the optimizer that prepare() returns",
            remedy="model, optimizer = accelerator.prepare(model, optimizer), and then the guard",
        )
    inner = uncompiled(model)
    if accelerator.num_processes > 1 and not isinstance(inner, DistributedDataParallel | FSDPModule):
        raise ConfigError(
            f"a plain {type(inner).__name__} on {accelerator.num_processes} processes",
            rule="gradients have to be reduced over all of them",
            remedy="hand over the model that accelerator.prepare(model) returns",
        )
    guard = StepGuard(model, several, **settings)
    accelerator.register_for_checkpointing(guard)
    accelerator.register_save_state_pre_hook(lambda *_: guard.flush())
    return guard


def refuse_unfit(accelerator: Any) -> None:
    """Refuses an accelerator whose gradients or optimizer are not torch's.

    Raises:
        ConfigError: it is one of DeepSpeed, Megatron-LM, FSDP1, XLA.
    """
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    is_fsdp1 = kind == "FSDP" and not accelerator.is_fsdp2
    if kind not in KINDS or is_fsdp1:
        raise ConfigError(
            f"accelerate with {'FSDP1' if is_fsdp1 else kind}",
            rule="the guard measures gradients of plain models, DDP and FSDP2, and steps torch's optimizers",
            remedy="use DDP, or FSDP with fsdp_version: 2",
        )
