"""What activation checkpointing adds to the operations of a step."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from harness.config import ModelConfig
from harness.dist.activations import checkpoint_activations
from harness.models import build_model
from harness.training.utilisation import recomputed_frac


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_what_is_computed_again_is_what_torch_counts(tie_embeddings: bool) -> None:
    config = ModelConfig(num_layers=2, dim=64, num_heads=2, vocab_size=512, tie_embeddings=tie_embeddings)

    def operations(model: nn.Module) -> int:
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(2, 8, dtype=torch.long)).sum().backward()
        return counter.get_total_flops()

    model = build_model(config, sequence_length=8)
    assert recomputed_frac(model) == 0
    before = operations(model)
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    checkpoint_activations(model, list(blocks), "full")
    # Attention itself has no parameters, and torch stops computing again at a block's last saved tensor.
    assert 1 + recomputed_frac(model) == pytest.approx(operations(model) / before, rel=0.05)
