"""What the backward pass computes again changes no gradients, random numbers, buffers; checks see it once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from harness.config import LoopConfig, ModelConfig, ParallelConfig
from harness.dist import World, distribute
from harness.errors import ConfigError
from harness.models import build_model
from harness.stability.checks.attention import AttentionProbe
from harness.wrappers import without_wrappers

ALONE = World(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


class Normalised(nn.Module):
    """Blocks with running statistics, and dropout between."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.4), nn.GELU()) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Centred(nn.Module):
    """What it reads it also updates: in place, by putting another tensor in its place, by batch_norm."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("square", torch.ones(6), persistent=False)
        self.register_buffer("scale", torch.full((6,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        with torch.no_grad():
            self.mean.lerp_(x.mean(0), 0.5)
            self.square = self.square.lerp(x.square().mean(0), 0.5)
        x = (x - self.mean) ** 2 / self.square.sqrt() * self.scale
        was = self.norm.running_mean.clone()
        return (self.norm(x) - was) * x


class Centring(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Centred() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.layers, self.layers[0]):  # called twice
            x = layer(x)
        return x


def decoder() -> nn.Module:
    return build_model(ModelConfig(num_layers=2, dim=16, num_heads=2, dropout=0.2), sequence_length=8)


MODELS: dict[str, tuple[Any, Tensor]] = {
    "decoder": (decoder, torch.arange(24).view(3, 8)),
    "running statistics": (Normalised, torch.linspace(-1, 1, 30).view(5, 6)),
    "statistics that are read": (Centring, torch.linspace(-1, 1, 30).view(5, 6)),
}


def trained(name: str, how: Any) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    """The model after two steps, its last gradients by name, and a number that is drawn after them."""
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    model = distribute(make(), ParallelConfig(activation_checkpointing=how), ALONE)
    for _ in range(2):
        model.zero_grad()
        model(inputs).square().mean().backward()
    return model, {without_wrappers(n): p.grad for n, p in model.named_parameters()}, torch.rand(())


@pytest.mark.parametrize("how", ["selective", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_buffers_and_generators_are_those_without_it(name: str, how: str) -> None:
    (plain, expected, drawn), (model, gradients, drawn_then) = trained(name, "none"), trained(name, how)
    assert gradients.keys() == expected.keys()
    for key, gradient in expected.items():
        assert torch.equal(gradients[key], gradient), key
    assert torch.equal(drawn, drawn_then)
    for before, after in zip(plain.buffers(), model.buffers(), strict=True):
        assert torch.equal(before, after)


def test_checks_see_each_call_of_attention_once() -> None:
    torch.manual_seed(0)
    model = distribute(decoder(), ParallelConfig(activation_checkpointing="full"), ALONE)
    with AttentionProbe() as probe:
        loss = model(MODELS["decoder"][1]).square().mean()
    loss.backward()
    assert len(probe.maxima) == 2


def memory_held(how: Any) -> int:
    """Bytes that the graph of a forward pass keeps for the backward pass."""
    torch.manual_seed(0)
    model = distribute(decoder(), ParallelConfig(activation_checkpointing=how), ALONE)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(MODELS["decoder"][1])
    return sum(kept.values())


def test_less_is_kept() -> None:
    assert memory_held("full") < memory_held("none") / 3


def test_a_block_that_stands_in_several_places_is_computed_again_in_each() -> None:
    block = nn.Linear(3, 3)
    layers: list[nn.Module] = [block, nn.Linear(3, 3), block]
    model = nn.Sequential(nn.ModuleList(layers))
    distribute(model, ParallelConfig(activation_checkpointing="full"), ALONE)
    first, second, third = model[0]
    assert first is third
    assert not any(isinstance(layer, nn.Linear) for layer in (first, second))


class Batched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 2 * 16 * 16).view(2, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.baddbmm(x, torch.bmm(x, self.weight).relu(), self.weight).relu()
        ends = torch.tensor([16, 32], dtype=torch.int32)
        return nn.functional.grouped_mm(x.flatten(0, 1), self.weight, offs=ends).view_as(x)


def flops_of_backward(how: Any) -> int:
    """Of its matrix products."""
    model = nn.Sequential(nn.ModuleList([Batched()]))
    distribute(model, ParallelConfig(activation_checkpointing=how), ALONE)
    loss = model[0][0](torch.ones(2, 16, 16)).square().mean()
    grouped = {torch.ops.aten._grouped_mm: lambda a, b, *_, **__: 2 * a[0] * a[1] * b[-1]}
    with FlopCounterMode(display=False, custom_mapping=grouped) as counter:
        loss.backward()
    return counter.get_total_flops()


def test_selective_computes_no_batched_product_again() -> None:
    assert flops_of_backward("selective") == flops_of_backward("none") < flops_of_backward("full")


def test_a_model_without_blocks_is_refused() -> None:
    for settings in (
        {"parallel": ParallelConfig(activation_checkpointing="full")},
        {"parallel": ParallelConfig(), "loop": LoopConfig(compile=True, compile_unit="block")},
    ):
        with pytest.raises(ConfigError, match="has no blocks"):
            distribute(nn.Linear(2, 2), world=ALONE, **settings)  # type: ignore[arg-type]
