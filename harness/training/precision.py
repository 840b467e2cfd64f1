"""The arithmetic of forward and backward passes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from harness import env
from harness.config import TrainConfig
from harness.errors import ConfigError

__all__ = ["autocast", "resolved_precision"]


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """The context in which forward passes run: bf16 or fp16 where autocast finds it safe, else nothing."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


def resolved_precision(config: TrainConfig, device: torch.device) -> str:
    """fp32, bf16 or fp16: what `loop.precision` means here."""
    if config.loop.precision != "auto":
        return config.loop.precision
    by_accelerate = env.accelerate_precision()
    if by_accelerate is not None:
        known = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}
        if by_accelerate not in known:
            raise ConfigError(
                f"accelerate's mixed_precision is {by_accelerate!r}", rule="it has to be no, bf16 or fp16"
            )
        return known[by_accelerate]
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
