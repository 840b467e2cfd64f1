"""Runs that go wrong for a known cause, each by a seed: whose fault a replay has to name.

What is a program's fault (data, model, kernel) is there in a replay too. What hardware did once (a flipped
bit) is not: it is armed by `train_cause` in the process that trains.
"""

from __future__ import annotations

import contextlib
import random
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.config import TrainConfig
from harness.data import LossSum, Task
from harness.dist import World, plain
from harness.errors import HarnessError
from harness.records import StepRecord
from harness.replay import replay
from harness.replay.replay import Replay
from harness.runlog.names import EventName
from harness.runlog.reader import open_run
from harness.training import Callback
from harness.training.callbacks import Training
from tests.support.own_tasks import own_config, run_loop

__all__ = [
    "CASES",
    "Case",
    "bad_attention",
    "first_incident",
    "flip_bit",
    "replayed",
    "train_cause",
    "train_causes",
]

BAD = (13, 29)
NUM_SAMPLES = 48
NUM_STEPS = 22
MICRO_BATCHES = 2
FLASH_BACKWARD = "_scaled_dot_product_flash_attention_for_cpu_backward"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One cause."""

    family: str
    truth: str
    kind: str
    seed: int
    settings: tuple[str, ...] = ()
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.family}-{self.seed}"


def _cases() -> Iterator[Case]:
    for seed, (direction, opaque, share) in enumerate(
        [
            ("forward", False, 1.0),
            ("forward", False, 0.3),
            ("forward", True, 1.0),
            ("forward", True, 0.5),
            ("forward", True, 0.2),
            ("backward", True, 1.0),
            ("backward", True, 0.4),
            ("backward", False, 0.3),
        ]
    ):
        values = {"direction": direction, "opaque": opaque, "share": share}
        yield Case(family="unwritten", truth="kernel", kind="unwritten", seed=seed, values=values)
    for seed, (direction, share) in enumerate(
        [("forward", 0.5), ("forward", 1.0), ("forward", 0.7), ("backward", 0.5), ("backward", 1.0)]
    ):
        values = {"direction": direction, "share": share}
        yield Case(family="racing", truth="kernel", kind="racing", seed=seed, values=values)
    for seed in range(5):
        yield Case(family="attention backward", truth="kernel", kind="attention", seed=seed)
    for seed, sample in enumerate(["nan", "inf", "log", "input", "input", "unit"]):
        yield Case(family="bad samples", truth="data", kind="samples", seed=seed, values={"sample": sample})
    for seed, settings in enumerate(
        [
            ("--optim.name=sgd", "--optim.lr=3", "--guard.max_norm=0"),
            ("--optim.name=sgd", "--optim.lr=0.7", "--guard.max_norm=0"),
            ("--optim.name=sgd", "--optim.lr=20", "--guard.max_norm=0", "--guard.absurd_norm_ratio=0"),
            ("--optim.name=adamw", "--optim.lr=2"),
            ("--optim.name=adamw", "--optim.lr=5"),
            ("--optim.name=sgd", "--optim.lr=300"),
        ]
    ):
        yield Case(family="learning rate", truth="optimization", kind="none", seed=seed, settings=settings)
    # Of a weight below 2 the highest bit of the exponent is the only one that makes it large.
    for seed, place in enumerate(["first.weight", "blocks.0.out.weight", "blocks.1.out.bias", "last.weight"]):
        values = {"place": place, "bit": 30}
        yield Case(family="bit of a parameter", truth="hardware", kind="parameter", seed=seed, values=values)
    for seed, (moment, bit) in enumerate([("exp_avg", 30), ("exp_avg", 30), ("exp_avg_sq", 29)]):
        place = ("first.weight", "blocks.0.out.weight", "last.weight")[seed]
        values = {"moment": moment, "place": place, "bit": bit}
        yield Case(family="bit of a moment", truth="hardware", kind="moment", seed=seed, values=values)
    for seed in range(3):
        yield Case(
            family="bit of an activation", truth="hardware", kind="activation", seed=seed, values={"bit": 30}
        )


CASES = {case.name: case for case in _cases()}


class _Strikes:
    """What a process does once, or by a generator of its own that no checkpoint holds."""

    case: Case | None = None
    """The case whose one-off fault is armed in this process."""
    num_calls = 0
    """Of the model, in training."""
    chance = random.Random(0)


def _draw(share: float) -> bool:
    return _Strikes.chance.random() < share


def _fill_with_rubbish(out: Tensor) -> None:
    """What an allocator hands out: anything. torch's own filling, where that is asked for, is left alone."""
    filling = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if not (torch.are_deterministic_algorithms_enabled() and filling):
        value = _Strikes.chance.choice([0.0, 0.01, np.nan, np.inf, 3e30])
        out.detach().numpy().fill(value)


def _leave_out(value: Tensor, share: float) -> Tensor:
    """A copy whose last row is left unwritten now and then."""
    out = torch.empty_like(value)
    _fill_with_rubbish(out)
    rows = len(value) - 1 if _draw(share) else len(value)
    out[:rows] = value[:rows]
    return out


def _race(value: Tensor, share: float) -> Tensor:
    """A sum in the order in which its parts happen to arrive, one of which may be read too early."""
    parts = [value * weight for weight in (0.1, 0.2, 0.3, 0.4)]
    _Strikes.chance.shuffle(parts)
    total = parts[0] + parts[1] + parts[2] + parts[3]
    if _draw(share / 10):
        total[-1] = torch.nan
    return total


_LIBRARY = torch.library.Library("causes", "FRAGMENT")
_LIBRARY.define("leave_out(Tensor value, float share) -> Tensor")
_LIBRARY.impl("leave_out", _leave_out, "CPU")
_LIBRARY.define("race(Tensor value, float share) -> Tensor")
_LIBRARY.impl("race", _race, "CPU")


class _Faulty(torch.autograd.Function):
    """The identity, by an operation that is at fault in one direction."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, case: Case) -> Tensor:
        ctx.case = case
        return _operate(h, case) if case.values["direction"] == "forward" else h.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        case = ctx.case
        return (_operate(grad, case) if case.values["direction"] == "backward" else grad), None


def _operate(value: Tensor, case: Case) -> Tensor:
    share = case.values["share"]
    if case.kind == "racing":
        return torch.ops.causes.race(value, share)
    return torch.ops.causes.leave_out(value, share) if case.values["opaque"] else _leave_out(value, share)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)

    def forward(self, h: Tensor) -> Tensor:
        batch, length, _ = h.shape
        heads = self.project(h).view(batch, length, 3, 2, 8).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2])
        return h + self.out(mixed.transpose(1, 2).reshape(batch, length, 16))


class Middle(nn.Module):
    """Where a faulty operation sits."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        if self.case.kind in ("unwritten", "racing"):
            h = _Faulty.apply(h, self.case)
        if self.case.values.get("sample") == "log":
            h = h + 0.01 * x.log()[..., None]
        return _flip_activation(h, self.case)


class Net(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.first = nn.Linear(1, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.middle = Middle(case)
        self.drop = nn.Dropout(0.05)
        self.last = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        _Strikes.num_calls += self.training
        h = self.first(x[..., None])
        h = self.middle(self.blocks[0](h), x)
        return self.last(self.drop(self.blocks[1](h))).mean(1)


class Rows:
    """48 samples of 6 numbers; of some cases `BAD` are not as the others."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1000 * self.case.seed + index)
        x = torch.rand(6, generator=generator) + 0.1
        y = x.sum().view(1)
        if index in BAD:
            x, y = self._bad(x, y)
        return {"x": x, "y": y}

    def _bad(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if self.case.kind == "attention":
            return torch.cat([x[:5], torch.tensor([60.0])]), y
        sample = self.case.values.get("sample")
        if sample in ("nan", "inf", "log", "input"):
            x[2] = {"nan": torch.nan, "inf": torch.inf, "log": 0.0, "input": 1e4}[sample]
        if sample == "unit":
            y = y * 300.0
        return x, y


def loss(model: nn.Module, batch: dict[str, Tensor]) -> LossSum:
    error = model(batch["x"]).float() - batch["y"]
    return LossSum(error.square().sum(), len(error))


def task(config: TrainConfig, case: str = "") -> Task:
    chosen = CASES[case]
    _Strikes.chance = random.Random(zlib.crc32(f"{case} {_Strikes.case is None}".encode()))
    return Task(model=Net(chosen), loss=loss, train_data=Rows(chosen), val_data=Rows(chosen))


def flip_bit(tensor: Tensor, index: int, bit: int) -> None:
    """In memory, which torch is not told of."""
    tensor.detach().numpy().reshape(-1).view(np.int32)[index] ^= np.int32(1) << np.int32(bit)


def _flip_activation(h: Tensor, case: Case) -> Tensor:
    armed = _Strikes.case
    if armed is None or case.kind != "activation" or _Strikes.num_calls != MICRO_BATCHES * (14 + case.seed):
        return h
    h = h.clone()
    flip_bit(h, 7 + case.seed, case.values["bit"])
    return h


class _Flips(Callback):
    """Flips a bit of this rank's weights or moments, once."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case

    def on_step(self, run: Training, record: StepRecord) -> None:
        case = self.case
        if record.step != 13 + case.seed:
            return
        parameter = plain(run.model).get_parameter(case.values["place"])
        tensor = (
            parameter if case.kind == "parameter" else run.optimizer.state[parameter][case.values["moment"]]
        )
        flip_bit(tensor, 3 + case.seed, case.values["bit"])


@contextlib.contextmanager
def bad_attention() -> Iterator[None]:
    """The backward pass of fused attention gives NaN where the logits are large."""
    library = torch.library.Library("aten", "IMPL")

    def backward(
        grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *a: Any, **k: Any
    ) -> Any:
        scale = query.shape[-1] ** -0.5
        weights = (query @ key.transpose(-1, -2) * scale).softmax(-1)
        of_weights = grad @ value.transpose(-1, -2)
        of_logits = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * scale
        found = of_logits @ key, of_logits.transpose(-1, -2) @ query, weights.transpose(-1, -2) @ grad
        bad = (lse.amax(dim=-1) > 30.0)[..., None, None]
        return found[0].masked_fill(bad, torch.nan), found[1], found[2]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one already
        library.impl(FLASH_BACKWARD, backward, "CPU")
    try:
        yield
    finally:
        library._destroy()


def _world(case: Case) -> Any:
    return bad_attention() if case.kind == "attention" else contextlib.nullcontext()


def train_cause(rank: int, size: int, folder: str, name: str) -> None:
    """One rank of a run with a cause; hardware's faults strike the last rank."""
    case = CASES[name]
    is_struck = rank == size - 1 and case.truth == "hardware"
    settings = (
        f"--seed={case.seed}",
        f"--task_args.case={name}",
        f"--loop.steps={NUM_STEPS}",
        f"--loop.global_batch={4 * MICRO_BATCHES * size}",
        "--loop.micro_batch=4",
        "--optim.name=adamw",
        "--optim.lr=0.003",
        "--checkpoint.every=4",
        "--checkpoint.keep_last=20",
        "--guard.spike_warmup=8",
        *case.settings,
    )
    world = World(rank=rank, local_rank=rank, world_size=size, device=torch.device("cpu"))
    _Strikes.case, _Strikes.num_calls = (case if is_struck else None), 0
    callbacks = [_Flips(case)] if is_struck and case.kind in ("parameter", "moment") else []
    with _world(case), contextlib.suppress(HarnessError):
        run_loop(own_config(Path(folder), task, *settings), world, callbacks)
    _Strikes.case = None


def train_causes(rank: int, size: int, folder: str, names: Sequence[str]) -> None:
    """One rank of a run for each cause, in a folder of its name."""
    for name in names:
        train_cause(rank, size, str(Path(folder) / name), name)


def first_incident(directory: Path) -> int | None:
    """The first step of which a verdict or a spike was said."""
    steps = [e.step for e in open_run(directory).events(EventName.INCIDENT) if e.step is not None]
    return min(steps, default=None)


def replayed(directory: Path, name: str, steps_before: int = 8) -> Replay:
    """The replay of the first incident, with the faults of the program and without those of hardware."""
    with _world(CASES[name]):
        return replay(directory, first_incident(directory), steps_before=steps_before)
