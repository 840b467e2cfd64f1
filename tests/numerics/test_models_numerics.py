"""The models' arithmetic: causality, rotary positions, grouped queries, Llama's formula, initialisation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.config import ModelConfig
from harness.models import Decoder, build_model
from harness.models.decoder import Rotary, rotate

SHAPE: dict[str, Any] = {"num_layers": 2, "dim": 32, "num_heads": 4, "vocab_size": 50}
GPT2: dict[str, Any] = {"norm": "layer", "positions": "learned", "mlp": "gelu", "bias": True}


def decoder(sequence_length: int = 24, **changes: Any) -> Decoder:
    torch.manual_seed(0)
    return Decoder(ModelConfig(**SHAPE | changes), sequence_length=sequence_length)


@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 2}, GPT2])
def test_the_future_does_not_change_the_past(changes: dict[str, Any]) -> None:
    model = decoder(**changes).double()
    tokens = torch.randint(0, 50, (2, 24))
    changed = tokens.clone()
    changed[:, 13] = (changed[:, 13] + 1) % 50
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :13], after[:, :13], rtol=0, atol=1e-14)
    assert not torch.allclose(before[:, 13:], after[:, 13:])


def test_a_prefix_gives_the_same_logits_as_the_whole() -> None:
    model = decoder().double()
    tokens = torch.randint(0, 50, (2, 24))
    torch.testing.assert_close(model(tokens)[:, :7], model(tokens[:, :7]), rtol=0, atol=1e-14)


def test_rotated_products_depend_on_the_distance_alone() -> None:
    torch.manual_seed(0)
    rotary = Rotary(16, 64, theta=10_000.0).double()
    cos, sin = rotary(64)
    q, k = torch.randn(16, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    scores = rotate(q.expand(64, 16), cos, sin) @ rotate(k.expand(64, 16), cos, sin).T
    for distance in (0, 1, 30):
        same = scores.diagonal(distance)
        # The arithmetic is float32 by design.
        torch.testing.assert_close(same, same[:1].expand_as(same), rtol=0, atol=1e-4)


def test_rotation_keeps_lengths_and_leaves_position_0_as_it_is() -> None:
    x = torch.randn(2, 3, 40, 16)
    turned = rotate(x, *Rotary(16, 64, theta=10_000.0)(40))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[..., 0, :], x[..., 0, :])


def test_grouped_queries_equal_full_attention_with_repeated_heads() -> None:
    grouped, full = decoder(num_kv_heads=2), decoder()
    weights = grouped.state_dict()
    for name in [name for name in weights if ".key." in name or ".value." in name]:
        per_head = weights[name].unflatten(0, (2, 8))
        weights[name] = per_head.repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(weights)
    tokens = torch.randint(0, 50, (2, 24))
    torch.testing.assert_close(grouped(tokens), full(tokens), rtol=1e-5, atol=1e-5)


def llama(weights: dict[str, Tensor], tokens: Tensor, *, heads: int, kv_heads: int) -> Tensor:
    """Llama written out in float64, in the convention of transformers' `LlamaForCausalLM`."""

    def norm(x: Tensor, name: str) -> Tensor:
        return weights[name] * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    def rotated(x: Tensor) -> Tensor:
        width = x.shape[-1]
        frequency = 10_000.0 ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
        angle = torch.outer(torch.arange(x.shape[-2], dtype=torch.float64), frequency).repeat(1, 2)
        half = torch.cat((-x[..., width // 2 :], x[..., : width // 2]), dim=-1)
        return x * angle.cos() + half * angle.sin()

    def split(x: Tensor, count: int) -> Tensor:
        return x.unflatten(-1, (count, -1)).transpose(1, 2)

    x = weights["token_embedding.weight"][tokens]
    future = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
    for layer in range(sum(".attention_norm." in name for name in weights)):
        w = {name.removeprefix(f"blocks.{layer}."): value for name, value in weights.items()}
        h = norm(x, f"blocks.{layer}.attention_norm.weight")
        q = rotated(split(h @ w["attention.query.weight"].T, heads))
        k = rotated(split(h @ w["attention.key.weight"].T, kv_heads)).repeat_interleave(heads // kv_heads, 1)
        v = split(h @ w["attention.value.weight"].T, kv_heads).repeat_interleave(heads // kv_heads, 1)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(future, -math.inf)
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ w["attention.out.weight"].T
        h = norm(x, f"blocks.{layer}.mlp_norm.weight")
        gate, up = h @ w["mlp.gate.weight"].T, h @ w["mlp.up.weight"].T
        x = x + (gate * gate.sigmoid() * up) @ w["mlp.down.weight"].T
    return norm(x, "norm.weight") @ weights["head.weight"].T


@pytest.mark.parametrize(("kv_heads", "tied"), [(4, True), (2, False)])
def test_it_computes_llamas_formula(kv_heads: int, tied: bool) -> None:
    model = decoder(num_kv_heads=kv_heads, tie_embeddings=tied, mlp_dim=48)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # far from the initial values
    tokens = torch.randint(0, 50, (2, 24))
    expected = llama(
        {name: value.double() for name, value in model.state_dict().items()},
        tokens,
        heads=4,
        kv_heads=kv_heads,
    )
    torch.testing.assert_close(model(tokens).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}, GPT2])
def test_it_begins_with_all_tokens_about_equally_likely(changes: dict[str, Any]) -> None:
    model = decoder(vocab_size=256, **changes)
    tokens = torch.randint(0, 256, (8, 25))
    logits = model(tokens[:, :-1]).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
    assert abs(loss.item() - math.log(256)) < 0.1


def test_the_residual_stream_does_not_grow_with_depth() -> None:
    def final_scale(num_layers: int) -> float:
        model = decoder(num_layers=num_layers, dim=64)
        stream: list[Tensor] = []
        model.norm.register_forward_pre_hook(lambda _module, inputs: stream.append(inputs[0]))
        with torch.no_grad():
            model(torch.randint(0, 50, (4, 24)))
        return stream[0].std().item()

    assert final_scale(32) < 1.5 * final_scale(2)


def test_under_autocast_norms_and_rotation_are_as_exact_as_in_float32() -> None:
    model = decoder()
    tokens = torch.randint(0, 50, (2, 24))
    kinds: dict[str, torch.dtype] = {}
    model.blocks[0].attention_norm.register_forward_hook(
        lambda _module, inputs, output: kinds.update(into=inputs[0].dtype, out=output.dtype)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(tokens)
    assert kinds == {"into": torch.float32, "out": torch.float32}
    torch.testing.assert_close(logits.float(), model(tokens), rtol=0, atol=0.02)

    far = torch.randn(1, 1, 4096, 16)
    table = Rotary(16, 4096, theta=10_000.0)(4096)
    in_bf16 = rotate(far.bfloat16(), *table)
    expected = rotate(far.bfloat16().float(), *table).bfloat16()
    assert in_bf16.dtype == torch.bfloat16
    assert torch.equal(in_bf16, expected)


@pytest.mark.parametrize("kind", ["cnn", "mlp"])
def test_image_models_treat_each_image_alone_and_begin_undecided(kind: Any) -> None:
    torch.manual_seed(0)
    config = ModelConfig(kind=kind, num_layers=3, dim=16)
    model = build_model(config, num_classes=10, image_shape=(3, 9, 7)).double()
    images = torch.randn(6, 3, 9, 7, dtype=torch.float64)
    logits = model(images)
    torch.testing.assert_close(logits[2:4], model(images[2:4]), rtol=0, atol=1e-12)
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(6))
    assert abs(loss.item() - math.log(10)) < 0.2
