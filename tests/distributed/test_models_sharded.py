"""The bundled models under DDP and FSDP2 compute what they compute alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from harness.config import ModelConfig
from harness.models import build_model
from tests.support.distributed import run_ranks

GPT2 = {"positions": "learned", "norm": "layer", "mlp": "gelu", "bias": True}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"num_kv_heads": 1},
    "gpt2": GPT2,
    "untied": {"tie_embeddings": False},
    "cnn": {"kind": "cnn"},
    "mlp": {"kind": "mlp"},
}


def build(case: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    config = ModelConfig(num_layers=2, dim=16, num_heads=2, **CASES[case])
    model = build_model(config, sequence_length=8, num_classes=4, image_shape=(1, 8, 8))
    if config.kind == "decoder":
        return model, torch.randint(0, 256, (4, 8))
    return model, torch.randn(4, 1, 8, 8)


def gradients(rank: int, world_size: int, case: str, strategy: str) -> dict[str, torch.Tensor]:
    """Whole gradients by name, each rank having seen its slice of the inputs."""
    model, inputs = build(case)
    wrapped = model
    if strategy == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        mesh = torch.distributed.init_device_mesh("cpu", (world_size,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    wrapped(inputs.chunk(world_size)[rank]).square().mean().backward()
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        found[name] = gradient.full_tensor() if strategy == "fsdp" else gradient
    return {name: value.detach().clone() for name, value in found.items()}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_get_the_gradients_of_one(case: str, strategy: str) -> None:
    model, inputs = build(case)
    model(inputs).square().mean().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    for found in run_ranks(gradients, 2, case, strategy):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
