"""Small image classifiers for images of any shape.

They normalise by GroupNorm and LayerNorm, not BatchNorm: BatchNorm's output depends on which samples share
a micro-batch and its running statistics differ between ranks, so that the same global batch would give
other gradients when it is split differently, and training and evaluation other outputs.
"""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor, nn

from harness.config import ModelConfig

__all__ = ["ConvNet", "Perceptron"]

_GROUPS = 8
_HEAD_STD = 0.02  # small: all classes are about equally likely at first


class ConvNet(nn.Module):
    """Images `[B, C, H, W]` to logits `[B, num_classes]`.

    `num_layers` stages of convolution, norm and GELU; each after the first halves height and width (down to
    1) and doubles the channels, beginning with `dim`. Then the mean over all places and a linear layer.
    """

    def __init__(self, config: ModelConfig, *, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        widths = [image_shape[0]] + [config.dim * 2**stage for stage in range(config.num_layers)]
        self.blocks = nn.ModuleList(
            _stage(widths[stage], widths[stage + 1], stride=1 if stage == 0 else 2, dropout=config.dropout)
            for stage in range(config.num_layers)
        )
        self.head = nn.Linear(widths[-1], num_classes)
        self.apply(_init)
        nn.init.normal_(self.head.weight, std=_HEAD_STD)

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


class Perceptron(nn.Module):
    """Images `[B, C, H, W]` to logits `[B, num_classes]`: `num_layers` hidden layers of width `dim`."""

    def __init__(self, config: ModelConfig, *, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        widths = [math.prod(image_shape)] + [config.dim] * config.num_layers
        self.blocks = nn.ModuleList(
            _hidden(inputs, outputs, dropout=config.dropout) for inputs, outputs in pairwise(widths)
        )
        self.head = nn.Linear(config.dim, num_classes)
        self.apply(_init)
        nn.init.normal_(self.head.weight, std=_HEAD_STD)

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(1)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


def _stage(inputs: int, outputs: int, *, stride: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1),
        nn.GroupNorm(math.gcd(_GROUPS, outputs), outputs),
        nn.GELU(),
        nn.Dropout(dropout),
    )


def _hidden(inputs: int, outputs: int, *, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.GELU(), nn.Dropout(dropout))


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")  # GELU's gain is close to ReLU's
        if module.bias is not None:
            nn.init.zeros_(module.bias)
