"""What the backward pass computes again changes no gradients, random numbers, buffers; checks see it once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

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


def decoder(dropout: float = 0.2) -> nn.Module:
    return build_model(ModelConfig(num_layers=2, dim=16, num_heads=2, dropout=dropout), sequence_length=8)


MODELS: dict[str, tuple[Any, Tensor]] = {
    "decoder": (decoder, torch.arange(24).view(3, 8)),
    "decoder without dropout": (lambda: decoder(0.0), torch.arange(24).view(3, 8)),
    "running statistics": (Normalised, torch.linspace(-1, 1, 30).view(5, 6)),
}


def trained(name: str, how: Any, **loop: Any) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    """The model after two steps, its last gradients by name, and a number that is drawn after them."""
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    parallel = ParallelConfig(activation_checkpointing=how)
    model = distribute(make(), parallel, ALONE, loop=LoopConfig(**loop))
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


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own
def test_blocks_that_are_compiled_too_give_the_same_gradients() -> None:
    _, gradients, _ = trained("decoder without dropout", "none")
    compiled = {"compile": True, "compile_unit": "block", "compile_backend": "aot_eager"}
    for how in ("none", "selective", "full"):
        torch.compiler.reset()
        _, found, _ = trained("decoder without dropout", how, **compiled)
        for key, gradient in gradients.items():
            torch.testing.assert_close(found[key], gradient, rtol=1e-5, atol=1e-7, msg=f"{how} {key}")


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


def test_a_model_without_blocks_is_refused() -> None:
    for settings in (
        {"parallel": ParallelConfig(activation_checkpointing="full")},
        {"parallel": ParallelConfig(), "loop": LoopConfig(compile=True, compile_unit="block")},
    ):
        with pytest.raises(ConfigError, match="has no blocks"):
            distribute(nn.Linear(2, 2), world=ALONE, **settings)  # type: ignore[arg-type]
