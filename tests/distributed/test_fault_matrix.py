"""Every kind of fault, everywhere it can strike: the step is left out on all ranks, to the last bit, and the
rank, micro-batch and parameter are named.

A cell is one step with one fault, three micro-batches long. Many cells run in one set of processes.
"""

from __future__ import annotations

import itertools
import logging
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from harness.config import FaultConfig, LoopConfig, ParallelConfig
from harness.data import LossSum
from harness.dist import Deferred, World, distribute, gradient_sync
from harness.records import StepRecord
from harness.stability import StepGuard
from harness.training.faults import FaultInjector
from tests.support.distributed import run_ranks
from tests.support.guarded import snapshot, worst_difference

KINDS = ("nan", "inf", "-inf", "overflow", "spike")
# First, middle and last parameter of the forward pass; GELU lets no infinity through unharmed.
TARGETS: tuple[tuple[Any, str | None], ...] = (
    ("loss", None),
    ("activation", "2"),
    ("gradient", "0.weight"),
    ("gradient", "2.weight"),
    ("gradient", "4.bias"),
)
MICRO_BATCHES, TOKENS, WARM = 3, 64, 40
SETTINGS: dict[str, Any] = {"spike": "skip", "spike_warmup": 24, "lag_steps": 0}


def cells(world_size: int, *, every: int = 1, prefix: str = "") -> list[FaultConfig]:
    """All faults for a world, each at a step of its own, in the order of the steps.

    Of four ranks a third: any three of kind, target, rank and micro-batch still meet in every combination.

    Args:
        every: Of these, one in so many.
        prefix: What stands before the names of the layers.
    """
    sizes = (len(KINDS), len(TARGETS), world_size, MICRO_BATCHES)
    everything = itertools.product(*map(range, sizes))
    chosen = [cell for cell in everything if world_size < 4 or sum(cell) % MICRO_BATCHES == 0]
    return [
        FaultConfig(
            step=WARM + i,
            rank=rank,
            kind=KINDS[kind],
            target=TARGETS[target][0],
            parameter=None if TARGETS[target][1] is None else f"{prefix}{TARGETS[target][1]}",
            micro_batch=micro,
            scale=1e4,
        )
        for i, (kind, target, rank, micro) in enumerate(chosen[::every])
    ]


SHARDED: dict[str, ParallelConfig] = {
    "hsdp": ParallelConfig(strategy="fsdp", replicate=2),
    "all": ParallelConfig(strategy="fsdp", meta_init=True, activation_checkpointing="full"),
}
"""As the trainer spreads a model; `all` is compiled by blocks besides."""


def _layers() -> list[nn.Module]:
    return [nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 1)]


class Chain(nn.Module):
    """As the other models here, with a block in a list, and the names of their parts."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(_layers())

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


class Trainee:
    """A model with its optimizer and guard, and a step of three micro-batches."""

    def __init__(self, wrap: str, rank: int, world_size: int, faults: list[FaultConfig]) -> None:
        torch.manual_seed(0)
        deferred = Deferred() if wrap in SHARDED and SHARDED[wrap].meta_init else None
        with nullcontext() if deferred is None else deferred:
            model: Any = Chain() if wrap in SHARDED else nn.Sequential(*_layers())
        self.model: nn.Module = model
        self.faults = FaultInjector(faults, model=model, rank=rank)
        if wrap == "ddp":
            self.model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        elif wrap == "fsdp":
            fully_shard(model[2])
            fully_shard(model)
        elif wrap in SHARDED:
            world = World(rank=rank, local_rank=rank, world_size=world_size, device=torch.device("cpu"))
            loop = LoopConfig(compile=wrap == "all", compile_unit="block", compile_backend="aot_eager")
            distribute(model, SHARDED[wrap], world, loop=loop, deferred=deferred)
        self.rank, self.world_size = rank, world_size
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.guard = StepGuard(self.model, self.optimizer, ladder=False, **SETTINGS)

    def step(self, data: int, *, fault: FaultConfig | None = None) -> StepRecord:
        """A step on the batch numbered `data`, with a fault or without."""
        for micro_batch in range(MICRO_BATCHES):
            inputs, targets = _data(data, self.rank, micro_batch)
            step = -1 if fault is None else fault.step
            with (
                self.faults.armed(step, micro_batch, {}),
                gradient_sync(self.model, on=micro_batch == MICRO_BATCHES - 1),
            ):
                # Linear far out: an overflow of the gradient is not one of the loss.
                total = nn.functional.smooth_l1_loss(self.model(inputs), targets, reduction="sum")
                zero = torch.zeros(())
                loss = self.faults.on_loss(LossSum(total=total, count=zero + TOKENS, correct=zero))
                nominal = TOKENS * MICRO_BATCHES * self.world_size
                (loss.total * self.world_size / nominal).backward()
                self.guard.accumulate(loss.total, loss.count)
        self.guard.step(nominal_tokens=nominal)
        self.optimizer.zero_grad()
        (record,) = self.guard.drain()
        return record


def _data(step: int, rank: int, micro_batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step * 1009 + rank * 31 + micro_batch)
    inputs = torch.randn(TOKENS, 4, generator=generator)
    return inputs, inputs.sum(1, keepdim=True) + torch.randn(TOKENS, 1, generator=generator)


def run_matrix(rank: int, world_size: int, wrap: str) -> list[str]:
    """Runs all cells; returns what was wrong in any of them."""
    logging.getLogger("harness").setLevel(logging.ERROR)
    faults = cells(world_size, every=7, prefix="parts.") if wrap in SHARDED else cells(world_size)
    trainee, twin = (Trainee(wrap, rank, world_size, faults) for _ in range(2))
    complaints: list[str] = []
    for step in range(WARM):
        verdicts = trainee.step(step).verdict, twin.step(step).verdict
        complaints += [] if "skip" not in verdicts else [f"step {step} without a fault: {verdicts}"]
    for fault in faults:
        before = snapshot(trainee.model, trainee.optimizer)
        record = trainee.step(fault.step, fault=fault)
        changed = worst_difference(before, snapshot(trainee.model, trainee.optimizer))
        found = list(_wrong(fault, record)) + ([f"{changed} changed"] if changed else [])
        complaints += [
            f"{fault.kind} {fault.target} {fault.parameter} {fault.rank}/{fault.micro_batch}: {f}"
            for f in found
        ]
        if fault.step % 10 == 0:
            # Goes on as a run without the faulty steps; more spikes in a row would be taken for a new level.
            verdicts = trainee.step(fault.step).verdict, twin.step(fault.step).verdict
            complaints += [] if "skip" not in verdicts else [f"step {fault.step} without a fault: {verdicts}"]
    differs = worst_difference(
        snapshot(trainee.model, trainee.optimizer), snapshot(twin.model, twin.optimizer)
    )
    return complaints + ([f"{differs} is not the twin's"] if differs else [])


def _wrong(fault: FaultConfig, record: StepRecord) -> list[str]:
    expected: dict[str, Any] = {"verdict": "skip", "rank": fault.rank, "micro_batch": fault.micro_batch}
    if fault.target == "gradient":
        expected["parameter"] = fault.parameter
        expected["num_nan"] = int(fault.kind == "nan")
        expected["num_inf"] = int(fault.kind in ("inf", "-inf"))
    expected["is_spike"] = fault.kind in ("overflow", "spike")
    return [
        f"{name} is {getattr(record, name)!r}, not {value!r} ({record.reason})"
        for name, value in expected.items()
        if getattr(record, name) != value
    ]


@pytest.mark.parametrize(
    ("wrap", "world_size"), [("ddp", 2), ("ddp", 4), ("fsdp", 2), ("hsdp", 4), ("all", 2)]
)
def test_every_fault_is_left_out_and_named(wrap: str, world_size: int) -> None:
    assert run_ranks(run_matrix, world_size, wrap, timeout_s=120) == [[]] * world_size


def test_a_third_of_the_cells_is_every_combination_of_three() -> None:
    chosen = [(cell.kind, (cell.target, cell.parameter), cell.rank, cell.micro_batch) for cell in cells(4)]
    values = (KINDS, TARGETS, range(4), range(MICRO_BATCHES))
    for some in itertools.combinations(range(4), 3):
        met = {tuple(cell[i] for i in some) for cell in chosen}
        assert met == set(itertools.product(*(values[i] for i in some)))


def test_every_fault_is_left_out_and_named_in_a_single_process() -> None:
    assert run_matrix(0, 1, "plain") == []


@pytest.mark.slow
def test_every_fault_is_left_out_and_named_on_four_shards() -> None:
    assert run_ranks(run_matrix, 4, "fsdp", timeout_s=170) == [[]] * 4
