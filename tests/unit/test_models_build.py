"""What configurations build: known sizes, legal shapes, all gradients, and clear refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from harness.config import ModelConfig
from harness.errors import ConfigError
from harness.models import build_model

GPT2 = ModelConfig(
    num_layers=12,
    dim=768,
    num_heads=12,
    vocab_size=50_257,
    positions="learned",
    norm="layer",
    mlp="gelu",
    bias=True,
)
LLAMA_1B = ModelConfig(
    num_layers=16,
    dim=2048,
    num_heads=32,
    num_kv_heads=8,
    mlp_dim=8192,
    vocab_size=128_256,
    rope_theta=500_000.0,
)
SMALL: dict[str, Any] = {"num_layers": 2, "dim": 16, "num_heads": 2}


@pytest.mark.parametrize(
    ("config", "sequence_length", "expected"), [(GPT2, 1024, 124_439_808), (LLAMA_1B, 64, 1_235_814_400)]
)
def test_published_models_have_their_published_size(
    config: ModelConfig, sequence_length: int, expected: int
) -> None:
    with torch.device("meta"):
        model = build_model(config, sequence_length=sequence_length)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("bias", [True, False])
def test_every_parameter_of_every_decoder_gets_a_gradient(
    mlp: Any, norm: Any, positions: Any, bias: bool
) -> None:
    config = ModelConfig(mlp=mlp, norm=norm, positions=positions, bias=bias, num_kv_heads=1, **SMALL)
    model = build_model(config, sequence_length=8)
    model(torch.randint(0, 256, (2, 8))).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert any("bias" in name for name, _ in model.named_parameters()) == bias


@pytest.mark.parametrize("kind", ["cnn", "mlp"])
@pytest.mark.parametrize("image_shape", [(1, 8, 8), (3, 1, 1), (2, 5, 31)])
def test_image_models_take_any_shape(kind: Any, image_shape: tuple[int, int, int]) -> None:
    model = build_model(ModelConfig(kind=kind, num_layers=3, dim=12), num_classes=4, image_shape=image_shape)
    logits = model(torch.randn(2, *image_shape))
    logits.square().sum().backward()
    assert logits.shape == (2, 4)
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["decoder", "cnn", "mlp"])
def test_an_empty_batch_gives_empty_logits(kind: Any) -> None:
    config = ModelConfig(kind=kind, **SMALL)
    model = build_model(config, sequence_length=8, num_classes=4, image_shape=(1, 8, 8))
    inputs = torch.zeros(0, 8, dtype=torch.int64) if kind == "decoder" else torch.zeros(0, 1, 8, 8)
    assert len(model(inputs)) == 0


@pytest.mark.parametrize("kind", ["decoder", "cnn", "mlp"])
def test_the_seed_decides_the_weights_and_a_checkpoint_restores_them(kind: Any) -> None:
    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        config = ModelConfig(kind=kind, **SMALL)
        return build_model(config, sequence_length=8, num_classes=4, image_shape=(1, 8, 8))

    first, second, other = build(0).state_dict(), build(0).state_dict(), build(1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], value) for name, value in other.state_dict().items())
    other.load_state_dict(first)


def test_blocks_stand_in_a_module_list() -> None:
    for kind in ("decoder", "cnn", "mlp"):
        config = ModelConfig(kind=kind, **SMALL)
        model = build_model(config, sequence_length=8, num_classes=4, image_shape=(1, 8, 8))
        assert isinstance(model.blocks, nn.ModuleList)
        assert len(model.blocks) == 2


def test_embeddings_are_tied_only_when_asked_for() -> None:
    tied = build_model(ModelConfig(**SMALL), sequence_length=8)
    apart = build_model(ModelConfig(tie_embeddings=False, **SMALL), sequence_length=8)
    assert tied.head.weight is tied.token_embedding.weight
    assert apart.head.weight is not apart.token_embedding.weight


def test_dropout_acts_in_training_only() -> None:
    model = build_model(ModelConfig(dropout=0.5, **SMALL), sequence_length=8)
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_a_sequence_that_is_too_long_is_refused() -> None:
    model = build_model(ModelConfig(**SMALL), sequence_length=8)
    with pytest.raises(ValueError, match="9 tokens: the model was built for 8"):
        model(torch.zeros(1, 9, dtype=torch.int64))


@pytest.mark.parametrize(("kind", "missing"), [("decoder", "sequence_length"), ("cnn", "num_classes")])
def test_what_a_model_needs_has_to_be_given(kind: Any, missing: str) -> None:
    with pytest.raises(ConfigError, match=missing):
        build_model(ModelConfig(kind=kind))


@pytest.mark.slow
def test_a_compiled_decoder_computes_the_same() -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(num_kv_heads=1, **SMALL), sequence_length=8)
    tokens = torch.randint(0, 256, (2, 8))
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(tokens), model(tokens))
