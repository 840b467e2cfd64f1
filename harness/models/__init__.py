"""The bundled models. They know no rank and no monitor."""

from harness.models.build import build_model
from harness.models.decoder import Decoder, training_flops_per_token
from harness.models.vision import ConvNet, Perceptron

__all__ = ["ConvNet", "Decoder", "Perceptron", "build_model", "training_flops_per_token"]
