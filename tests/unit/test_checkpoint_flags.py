"""How an optimizer computes its update is the live one's affair; a checkpoint changes only its state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness.checkpoint import Checkpointer
from tests.support.checkpoints import TinyModel

MAKE: dict[str, Any] = {
    "adamw": lambda p, **flags: torch.optim.AdamW(p, lr=0.01, **flags),
    "amsgrad": lambda p, **flags: torch.optim.Adam(p, lr=0.01, amsgrad=True, **flags),
    "sgd": lambda p, **flags: torch.optim.SGD(p, lr=0.1, momentum=0.9, **flags),
    "adagrad": lambda p, **flags: torch.optim.Adagrad(p, lr=0.1, **flags),
}
FLAGS: list[dict[str, bool]] = [{"fused": True}, {"fused": False}, {"foreach": True}, {}]


def make(name: str, flags: dict[str, bool]) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = TinyModel()
    return model, MAKE[name](model.parameters(), **flags)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, *seeds: int) -> None:
    for seed in seeds:
        tokens = torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(seed))
        model(tokens).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", MAKE)
def test_an_optimizer_goes_on_with_its_own_flags(name: str, tmp_path: Path) -> None:
    for number, saved in enumerate(FLAGS):
        one = make(name, saved)
        train(*one, 0, 1)
        with Checkpointer(tmp_path / str(number)) as checkpointer:
            checkpointer.save(1, {"model": one[0], "optimizer": one[1]})
            checkpointer.wait()
            train(*one, 2, 3)
            for live in FLAGS:
                for steps_before in ((), (5,)):  # with state of its own, and without
                    other = make(name, live)
                    before = dict(other[1].param_groups[0], params=None, lr=None)
                    train(*other, *steps_before)
                    checkpointer.load({"model": other[0], "optimizer": other[1]})
                    assert dict(other[1].param_groups[0], params=None, lr=None) == before
                    train(*other, 2, 3)
                    for key, value in one[0].state_dict().items():
                        # Fused arithmetic rounds differently; without a moment or step count it is 1e-3 off.
                        torch.testing.assert_close(other[0].state_dict()[key], value, rtol=1e-5, atol=1e-6)


def test_what_defines_the_update_comes_from_the_checkpoint(tmp_path: Path) -> None:
    model = TinyModel()
    saved = torch.optim.AdamW(model.parameters(), lr=0.5, betas=(0.1, 0.2), weight_decay=0.3, maximize=True)
    live = torch.optim.AdamW(model.parameters(), fused=True)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"model": model, "optimizer": saved})
        checkpointer.wait()
        checkpointer.load({"model": model, "optimizer": live})
    names = ("lr", "betas", "weight_decay", "maximize", "fused")
    assert [live.param_groups[0][name] for name in names] == [0.5, (0.1, 0.2), 0.3, True, True]
