"""Wrappers leave names as the model's author gave them, and no name that only looks like one of theirs."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from harness.checkpoint.adapters import adapters
from harness.tracking.model_state import as_named_by, bare_state
from harness.wrappers import uncompiled, without_wrappers


class Own(torch.nn.Module):
    """Names of its own that end like those of wrappers."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.my_orig_mod = inner
        self.x_checkpoint_wrapped_module = torch.nn.Linear(1, 1)


def test_only_whole_parts_of_a_name_are_wrappers() -> None:
    parts = ["_orig_mod", "_checkpoint_wrapped_module", "my_orig_mod", "layer", "_orig_mod_"]
    for names in itertools.product(parts, repeat=3):
        own = [name for name in names if name not in parts[:2]]
        assert without_wrappers(".".join([*names, "weight"])) == ".".join([*own, "weight"])


def test_a_compiled_module_and_one_that_is_not_give_the_same() -> None:
    module = torch.nn.Linear(1, 1)
    assert uncompiled(torch.compile(module)) is uncompiled(module) is module
    module.compile()
    assert uncompiled(module) is module


def test_tracker_and_checkpoints_keep_a_models_own_names() -> None:
    plain = Own(torch.nn.Linear(1, 1))
    wrapped = torch.compile(Own(checkpoint_wrapper(torch.compile(torch.nn.Linear(1, 1)))))
    names = list(plain.state_dict())
    assert list(bare_state(wrapped)) == names
    [adapter] = adapters({"model": wrapped})
    assert list(adapter.tree()) == names


def test_a_models_modules_are_walked_once_whatever_the_number_of_its_names() -> None:
    class Counted(torch.nn.Sequential):
        walks = 0

        def named_modules(self, *given: Any, **named: Any) -> Any:
            self.walks += 1
            return super().named_modules(*given, **named)

    model = Counted(*(torch.nn.Linear(1, 1) for _ in range(50)))
    as_named_by(bare_state(model), model, is_bare=True)
    assert model.walks == 2
