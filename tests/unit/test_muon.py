"""Muon in the trainer: which parameters it steps, at which rate, and that a run of it goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from harness.config import ModelConfig, MuonConfig, OptimConfig
from harness.errors import ConfigError
from harness.models import build_model
from harness.replay import replay
from harness.runlog.reader import open_run
from harness.training import optim, train
from harness.training.muon import hidden_matrices
from harness.training.optim import build_optimizers, set_learning_rate
from tests.support.runs import tiny_config


def _names(model: nn.Module, **settings: tuple[str, ...]) -> set[str]:
    chosen = set(map(id, hidden_matrices(model, **settings)))
    return {name for name, parameter in model.named_parameters() if id(parameter) in chosen}


@pytest.mark.parametrize("tied", [True, False])
def test_muon_steps_the_matrices_of_the_blocks_and_adamw_the_rest(tied: bool) -> None:
    config = ModelConfig(num_layers=2, dim=16, num_heads=2, bias=True, tie_embeddings=tied)
    model = build_model(config, sequence_length=8)
    chosen = _names(model)
    assert chosen == {
        name for name, p in model.named_parameters() if name.startswith("blocks.") and p.dim() == 2
    }
    optimizers = build_optimizers(model, OptimConfig(name="muon"), is_sharded=False)
    assert [type(one).__name__ for one in optimizers.values()] == ["AdamW", "Muon"]
    held = [p for one in optimizers.values() for group in one.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))


def test_embeddings_shared_weights_and_what_is_excluded_are_not_hidden_matrices() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList(
        nn.ModuleDict({"router": nn.Linear(4, 4), "bias": nn.Embedding(4, 4), "up": nn.Linear(4, 4)})
        for _ in range(2)
    )
    model.head = nn.Linear(4, 4)
    model.blocks[1]["up"].weight = model.head.weight
    model.blocks[1]["router"].weight.requires_grad_(False)
    assert _names(model) == {"blocks.0.router.weight", "blocks.0.up.weight"}
    assert _names(model, exclude=("router",)) == {"blocks.0.up.weight"}
    with pytest.raises(ConfigError, match="no hidden matrices"):
        hidden_matrices(model, exclude=("router", "up"))


def test_the_rates_of_both_follow_the_schedule() -> None:
    model = build_model(ModelConfig(num_layers=1, dim=16, num_heads=2), sequence_length=8)
    muon = MuonConfig(lr=0.02, weight_decay=0.0)
    optimizers = build_optimizers(model, OptimConfig(name="muon", lr=1e-3), muon, is_sharded=False)
    set_learning_rate(optimizers.values(), 5e-4)
    assert {g["lr"] for g in optimizers["optimizer"].param_groups} == {5e-4}
    assert optimizers["muon"].param_groups[0]["lr"] == pytest.approx(0.01)
    assert {g["weight_decay"] for g in optimizers["muon"].param_groups} == {0.0}
    both = build_optimizers(model, OptimConfig(name="muon", lr=1e-3), is_sharded=False)
    set_learning_rate(both.values(), 7e-4)
    assert {g["lr"] for one in both.values() for g in one.param_groups} == {7e-4}


def test_a_run_of_muon_learns_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    common = ["--optim.name=muon", "--muon.lr=0.02", "--muon.adjust_lr=original", "--schedule.kind=constant"]
    train(tiny_config(tmp_path, *common, f"--runs_dir={tmp_path / 'whole'}"))
    for steps in (5, 12):
        train(tiny_config(tmp_path, *common, f"--runs_dir={tmp_path / 'parts'}", f"--loop.steps={steps}"))
    whole, parts = (
        open_run(tmp_path / name / "tiny").scalars("train/loss").values.tolist()
        for name in ("whole", "parts")
    )
    assert whole == parts
    assert whole[-1] < whole[0]
    with pytest.raises(ConfigError, match=r"muon\.lr"):
        train(tiny_config(tmp_path, *common, f"--runs_dir={tmp_path / 'parts'}", "--muon.lr=0.01"))


def test_releases_are_compared_as_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, release in (("2.9.1", (2, 9)), ("2.13.0+cpu", (2, 13)), ("2.14.0a0+git1", (2, 14))):
        monkeypatch.setattr(torch, "__version__", version)
        assert optim._torch_release() == release


def test_a_replay_takes_the_steps_that_muon_took(tmp_path: Path) -> None:
    train(tiny_config(tmp_path, "--optim.name=muon", "--faults=[{step: 7, kind: nan}]"))
    found = replay(tmp_path / "runs/tiny", 7)
    assert found.reproduced
    assert found.parting.is_same
