"""Makes the model that a configuration describes."""

from __future__ import annotations

from torch import nn

from harness.config import ModelConfig
from harness.errors import ConfigError
from harness.models.decoder import Decoder
from harness.models.vision import ConvNet, Perceptron

__all__ = ["build_model"]


def build_model(
    config: ModelConfig,
    *,
    sequence_length: int | None = None,
    num_classes: int | None = None,
    image_shape: tuple[int, int, int] | None = None,
) -> nn.Module:
    """A freshly initialised model on the CPU, drawn from torch's global generator.

    Args:
        config: Its shape.
        sequence_length: Longest sequence, for a decoder.
        num_classes: Classes to tell apart, for an image model.
        image_shape: Channels, height and width, for an image model.

    Raises:
        ConfigError: what a model of this kind needs has not been given.
    """
    if config.kind == "decoder":
        if sequence_length is None:
            raise _missing(config.kind, "sequence_length")
        return Decoder(config, sequence_length=sequence_length)
    if num_classes is None or image_shape is None:
        raise _missing(config.kind, "num_classes and image_shape")
    kind = ConvNet if config.kind == "cnn" else Perceptron
    return kind(config, num_classes=num_classes, image_shape=image_shape)


def _missing(kind: str, what: str) -> ConfigError:
    return ConfigError(f"model.kind is {kind!r}", rule=f"building it takes {what}")
