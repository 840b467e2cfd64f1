"""Whatever state there is comes back as it was, bit for bit, or is refused by name."""

from __future__ import annotations

import copy
import itertools
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from harness.checkpoint import Checkpointer, Rng
from harness.config import CheckpointConfig
from harness.errors import CheckpointError
from tests.support.checkpoints import TinyModel, TinyRun


def round_trip(directory: Path, saved: dict[str, Any], loaded: dict[str, Any]) -> dict[str, Any]:
    with Checkpointer(directory) as checkpointer:
        checkpointer.save(1, saved)
        checkpointer.wait()
        assert checkpointer.load(loaded) == 1
    return loaded


def test_plain_data_comes_back_with_its_types(tmp_path: Path) -> None:
    value = {
        "none": None,
        "numbers": [True, 1, 2**80, 0.1, -0.0, math.inf],
        "tuple": (1, ("a", b"\x00\xff")),
        "keys": {1: "int", (2, "b"): "tuple", "$odd": 3},
        "empty": [{}, [], ()],
        "text": 'ä "quoted" \ud800',
    }
    loaded = round_trip(tmp_path, {"x": value}, {"x": None})["x"]
    assert loaded == value
    assert type(loaded["numbers"][0]) is bool
    assert math.copysign(1, loaded["numbers"][4]) == -1
    assert math.isnan(round_trip(tmp_path, {"x": math.nan}, {"x": 0})["x"])


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.complex64, torch.complex128, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
        torch.uint16, torch.uint32, torch.uint64, torch.bool,
    ],
)  # fmt: skip
def test_tensors_of_every_dtype_and_shape_come_back_with_all_their_bits(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for shape in [(), (0,), (1,), (3, 0, 2), (5, 7), (2, 3, 4)]:
        size = math.prod(shape) * dtype.itemsize
        raw = torch.randint(
            2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8, generator=generator
        )
        tensors.append(raw.view(dtype).view(shape))
    tensors.append(tensors[4].t())  # not contiguous
    loaded = round_trip(tmp_path, {"x": tensors}, {"x": None})["x"]
    for tensor, back in zip(tensors, loaded, strict=True):
        assert back.dtype == dtype
        assert back.shape == tensor.shape
        assert back.contiguous().view(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))


def test_arrays_come_back_as_arrays(tmp_path: Path) -> None:
    value = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "scalar": np.int64(3)}
    loaded = round_trip(tmp_path, {"x": value}, {"x": None})["x"]
    assert isinstance(loaded["a"], np.ndarray)
    assert np.array_equal(loaded["a"], value["a"])
    assert loaded["scalar"] == 3


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [
            random.random(),
            random.gauss(0, 1),
            np.random.rand(),
            np.random.randn(),
            float(torch.rand(())),
        ]

    random.gauss(0, 1)
    np.random.randn()  # each of the two keeps a second number back
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"rng": Rng()})
        expected = draw()
        draw()
        checkpointer.load({"rng": Rng()})
        assert draw() == expected


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, amsgrad=True, foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "plain sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p),
    "adafactor": lambda p: torch.optim.Adafactor(p),
    "rmsprop": lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.5),
    "nadam": lambda p: torch.optim.NAdam(p),
    "asgd": lambda p: torch.optim.ASGD(p),
    "named": lambda p: torch.optim.AdamW([(f"p{i}", param) for i, param in enumerate(p)]),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_optimizer_goes_on_as_if_never_interrupted(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    def make(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        torch.manual_seed(seed)
        model = TinyModel().to(dtype)
        model.blocks[0].bias.requires_grad_(False)
        optimizer = OPTIMIZERS[name](list(model.parameters()))
        return model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
        for seed in range(3):
            tokens = torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(seed))
            model(tokens).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

    one, other = make(0), make(1)
    train(*one)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, dict(zip(["model", "optimizer", "schedule"], one, strict=True)))
        checkpointer.wait()
        checkpointer.load(dict(zip(["model", "optimizer", "schedule"], other, strict=True)))
    train(*one)
    train(*other)
    for (key, left), right in zip(one[0].state_dict().items(), other[0].state_dict().values(), strict=True):
        assert left.equal(right), key
    assert one[1].param_groups[0]["lr"] == other[1].param_groups[0]["lr"]


def test_saving_a_fresh_optimizer_leaves_it_fresh(tmp_path: Path) -> None:
    run = TinyRun("plain")
    round_trip(tmp_path, run.state(), run.state())
    assert not run.optimizer.state


def test_loading_an_earlier_state_forgets_moments_that_it_did_not_have(tmp_path: Path) -> None:
    run = TinyRun("plain")
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, run.state())
        checkpointer.wait()
        run.train(2)
        checkpointer.load(run.state())
    assert not run.optimizer.state


def test_moments_wider_than_their_parameters_keep_their_width(tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Linear(3, 3, bias=False, dtype=torch.bfloat16)
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    model, optimizer = make()
    moment = torch.rand(3, 3)
    optimizer.state[model.weight]["momentum_buffer"] = moment
    other, restored = make()
    round_trip(tmp_path, {"model": model, "optimizer": optimizer}, {"model": other, "optimizer": restored})
    assert restored.state[other.weight]["momentum_buffer"].equal(moment)


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path: Path) -> None:
    model, other = TinyModel(width=200), TinyModel(width=200)
    round_trip(tmp_path, {"model": model}, {"model": other})
    assert other.head.weight is other.embed.weight
    assert other.head.weight.equal(model.embed.weight)
    (shard,) = (tmp_path / "step-00000001").glob("*.safetensors")
    assert shard.stat().st_size < sum(p.nbytes for p in model.parameters()) + 4096


def test_a_compiled_and_a_plain_model_share_checkpoints(tmp_path: Path) -> None:
    plain, compiled = TinyModel(), torch.compile(copy.deepcopy(TinyModel()))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (plain, compiled)]
    round_trip(
        tmp_path,
        {"model": plain, "optimizer": optimizers[0]},
        {"model": compiled, "optimizer": optimizers[1]},
    )
    assert compiled.embed.weight.equal(plain.embed.weight)


def test_several_models_and_optimizers_go_into_one_checkpoint(tmp_path: Path) -> None:
    def make(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        models = {"generator": nn.Linear(2, 3), "critic": nn.Linear(2, 3)}
        optimizers = {f"{k}_optimizer": torch.optim.Adam(m.parameters()) for k, m in models.items()}
        for model in models.values():
            model(torch.rand(4, 2)).sum().backward()
        for optimizer in optimizers.values():
            optimizer.step()
        return {**optimizers, **models}

    one, other = make(0), make(1)
    round_trip(tmp_path, one, other)
    assert one["critic"].weight.equal(other["critic"].weight)
    moments = [o["critic_optimizer"].state[o["critic"].weight]["exp_avg"] for o in (one, other)]
    assert moments[0].equal(moments[1])


def layers(*widths: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(i, o) for i, o in itertools.pairwise(widths)))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda: layers(4, 3), "1.weight: not in the model"),
        (lambda: layers(4, 3, 2, 2), "2.weight: not in the checkpoint"),
        (lambda: layers(4, 3, 5), r"1.weight: float32 \[2, 3\] in the checkpoint"),
        (lambda: layers(4, 3, 2).bfloat16(), r"bfloat16 \[3, 4\] in the model"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_name_and_nothing_is_touched(
    tmp_path: Path, other: Any, said: str
) -> None:
    model = other()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=said):
        round_trip(tmp_path, {"model": layers(4, 3, 2)}, {"model": model})
    assert all(before[name].equal(tensor) for name, tensor in model.state_dict().items())
    assert (tmp_path / "step-00000001").exists()  # it is of another model, not damaged


def test_other_parameter_groups_are_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    one = torch.optim.SGD(model.parameters(), lr=0.1)
    two = torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias]}], lr=0.1)
    with pytest.raises(CheckpointError, match=r"groups of \[2\] parameters, the optimizer of \[1, 1\]"):
        round_trip(tmp_path, {"model": model, "optimizer": one}, {"model": model, "optimizer": two})


def test_a_key_that_was_not_saved_is_named_and_one_that_is_not_wanted_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no state 'y': it holds x, z\."):
        round_trip(tmp_path, {"x": 1, "z": 2}, {"y": None})
    assert round_trip(tmp_path, {"x": 1, "z": 2}, {"z": None}) == {"z": 2}


def test_an_object_that_refuses_its_state_is_named(tmp_path: Path) -> None:
    class Picky:
        def state_dict(self) -> dict[str, int]:
            return {"a": 1}

        def load_state_dict(self, state: dict[str, int]) -> None:
            raise KeyError("b")

    with pytest.raises(CheckpointError, match="x refuses its state of step 1: KeyError: 'b'"):
        round_trip(tmp_path, {"x": Picky()}, {"x": Picky()})


def test_an_empty_or_missing_directory_has_no_checkpoint(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "none") as checkpointer:
        assert checkpointer.load({"x": None}) is None
        assert checkpointer.steps() == []
        with pytest.raises(CheckpointError, match="no checkpoint of step 3"):
            checkpointer.load({"x": None}, step=3)
    assert not (tmp_path / "none").exists()


def test_a_configuration_makes_a_checkpointer(tmp_path: Path) -> None:
    config = CheckpointConfig(keep_last=1)
    with Checkpointer.from_config(tmp_path, config) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"x": 1})
        checkpointer.wait()
        assert checkpointer.steps() == [2]
