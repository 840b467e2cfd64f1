"""What `--dry_run` predicts, against what a GPU's allocator gives out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harness.data import fetch, run_loss, to_device
from harness.training import forecast_memory
from harness.training.optim import build_optimizers
from harness.training.precision import autocast
from harness.training.tasks import build_task
from tests.support.runs import tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WIDE = ("--model.dim=512", "--model.num_layers=3", "--model.num_heads=8", "--data.sequence_length=256")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_a_rank_takes_is_predicted(precision: str, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, *WIDE, f"--loop.precision={precision}")
    forecast = forecast_memory(config, num_ranks=1)
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    task = build_task(config)
    model = task.model.to(device)
    optimizers = build_optimizers(model, config.optim, config.muon, is_sharded=False)
    batch = to_device(fetch(task.train_data, list(range(config.loop.global_batch))), device)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        with autocast(device, precision):
            loss = run_loss(task, model, batch)
        loss.total.backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        del loss
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(forecast.total, rel=0.1)
