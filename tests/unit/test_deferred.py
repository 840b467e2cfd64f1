"""Initialisation that is put off gives the bits that it would have given at once, whatever is done in it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from harness.config import ModelConfig
from harness.dist import Deferred
from harness.errors import ConfigError
from harness.models import build_model


class Initialised(nn.Module):
    """By torch's own ways: some draw again, read what they wrote, or leave out the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.truncated = nn.Parameter(torch.empty(6, 6))
        nn.init.trunc_normal_(self.truncated, std=1.0, a=-0.5, b=0.5)
        self.orthogonal = nn.Parameter(torch.randn(4, 6))
        nn.init.orthogonal_(self.orthogonal)
        self.sparse = nn.Linear(5, 5)
        nn.init.sparse_(self.sparse.weight, 0.3)
        self.convolution = nn.Conv2d(3, 8, 3)
        nn.init.dirac_(self.convolution.weight)
        self.embedding = nn.Embedding(5, 6, padding_idx=0)
        self.lstm = nn.LSTM(3, 4)
        self.layers = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False
        )
        self.normalised = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))


class MadeOfOthers(nn.Module):
    """Parameters that are shared, copied, computed from others, written in part, and read."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Parameter(torch.empty(6, 6))
        self.first, self.second = shared, shared
        nn.init.normal_(self.first)
        self.with_values = nn.Parameter(torch.randn(3))
        self.copied = copy.deepcopy(nn.Linear(4, 4))
        self.copied.weight.data.mul_(0.5).add_(self.with_values.mean())
        self.narrow = nn.Linear(4, 4).bfloat16()
        with torch.no_grad():
            self.narrow.weight.copy_(torch.arange(16.0).view(4, 4))
            self.narrow.bias[1:3] = torch.rand(2)
            self.narrow.bias[0] = 7.0
            self.copied.bias += torch.randn_like(self.copied.bias) * torch.rand(())
        if self.first.abs().max() > 0.1:
            nn.init.eye_(self.second)
        self.register_buffer("total", self.with_values.detach().sum() * torch.ones(2))
        self.register_buffer("zeros", torch.zeros(3, device=self.first.device))
        self.norm = nn.BatchNorm1d(4)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "initialised": Initialised,
    "made of others": MadeOfOthers,
    "decoder": lambda: build_model(ModelConfig(dim=16, num_heads=2), sequence_length=8),
    "cnn": lambda: build_model(ModelConfig(kind="cnn", dim=8), num_classes=3, image_shape=(1, 8, 8)),
}


def built(make: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor]:
    """The model, and a number that is drawn after it."""
    torch.manual_seed(3)
    model = make()
    return model, torch.rand(())


@pytest.mark.parametrize("name", MODELS)
def test_what_is_put_off_is_the_same_to_the_last_bit(name: str) -> None:
    expected, drawn = built(MODELS[name])
    with Deferred() as deferred:
        model, drawn_then = built(MODELS[name])
    assert all(parameter.is_meta for parameter in model.parameters())
    deferred.name(model)
    deferred.materialise(model, torch.device("cpu"))
    assert torch.equal(drawn, drawn_then)
    assert torch.equal(torch.rand(()), (built(MODELS[name]), torch.rand(()))[1])
    found = dict(model.named_buffers()) | model.state_dict()
    for key, value in (dict(expected.named_buffers()) | expected.state_dict()).items():
        assert torch.equal(found[key], value), key


def test_values_from_the_meta_device_are_refused() -> None:
    with Deferred(), pytest.raises(ConfigError, match="meta_init false"):
        nn.Linear(2, 2).weight.data.copy_(nn.Module.get_parameter(OUTSIDE, "weight"))


OUTSIDE = nn.Linear(2, 2, device="meta")
