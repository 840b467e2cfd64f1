"""Matrix products in float8, by torchao."""

from __future__ import annotations

import logging

import torch
from torch import nn

from harness.errors import ConfigError, needs

__all__ = ["use_float8"]

logger = logging.getLogger(__name__)

_MULTIPLE = 16
"""Of both sides of a weight, which the device's kernels ask for."""


def use_float8(model: nn.Module, device: torch.device) -> None:
    """Has linear layers of the model's blocks compute in float8, with a scale for each tensor and call.

    Weights, gradients and checkpoints are as before. The head stays as it is: the loss would suffer most
    there. On a device without float8 (CUDA's compute capability 8.9) the rounding is emulated, which is slow.

    Raises:
        ConfigError: no layer is fit for it.
        HarnessError: torchao is not installed.
    """
    with needs("torchao", extra="float8"):
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    fit = {
        f"{name}.{inner}" if inner else name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        for inner, part in module.named_modules()
        if isinstance(part, nn.Linear) and not (part.in_features % _MULTIPLE or part.out_features % _MULTIPLE)
    }
    if not fit:
        raise ConfigError(
            "loop.float8 is true, and no layer of the model is fit for it",
            rule=f"linear layers in a torch.nn.ModuleList, both sides a multiple of {_MULTIPLE}",
            remedy="leave it out for this model",
        )
    has_float8 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    convert_to_float8_training(
        model,
        # Padded, since a micro-batch may have any number of tokens, and kernels ask for multiples there too.
        config=Float8LinearConfig(emulate=not has_float8, pad_inner_dim=True),
        module_filter_fn=lambda _, name: name in fit,
    )
    logger.info("%d linear layers compute in float8%s", len(fit), "" if has_float8 else ", emulated")
