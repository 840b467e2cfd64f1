"""A parameter that the loss does not depend on, on all ranks or on one: no rank waits, and it is named."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from harness.config import FaultConfig, ParallelConfig
from harness.data import Batch, LossSum, Task
from harness.dist import UnusedParameters, World, distribute, plain
from harness.errors import ConfigError
from harness.stability import StepGuard
from harness.training.faults import FaultInjector
from harness.training.progress import Progress
from harness.training.step import StepRunner
from harness.training.timer import StepTimer
from tests.support.distributed import run_ranks

NO_FAULTS: list[FaultConfig] = []


class Branches(nn.Module):
    """The batch says which of its branches the output depends on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(4, 4)
        self.branches = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.spare = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor, used: list[int]) -> Tensor:
        x = self.stem(x)
        for number in used:
            x = torch.tanh(self.branches[number](x)) if number < 3 else x
        return x if 3 in used else x + self.spare.sum()


def loss(model: nn.Module, batch: Batch) -> LossSum:
    used = [int(number) for number in batch["used"].tolist()]
    total = model(batch["x"], used).square().sum()
    return LossSum(total, torch.tensor(3.0), torch.tensor(0.0))


Step = dict[int, list[list[int]]]
"""By rank, the branches that each micro-batch uses; a 3 among them leaves the spare parameter out."""

EVERYTHING = [0, 1, 2]
CASES: dict[str, tuple[list[Step], str]] = {
    "on all ranks": ([{0: [[0, 1, 3]], 1: [[0, 1, 3]]}] * 3, "spare, branches.2.weight, branches.2.bias"),
    "on one rank": ([{0: [EVERYTHING], 1: [[0, 2]]}] * 3, "branches.1.weight, branches.1.bias on rank 1"),
    "others on each": (
        [{0: [[0, 1, 3]], 1: [[0, 2, 3]]}] * 3,
        "spare; branches.2.weight, branches.2.bias on rank 0; branches.1.weight, branches.1.bias on rank 1",
    ),
    "in the last micro-batch alone": ([{0: [EVERYTHING, [0, 1, 3]], 1: [EVERYTHING, EVERYTHING]}] * 3, ""),
    "in one late step": (
        [{0: [EVERYTHING] * 2, 1: [EVERYTHING] * 2}] * 2 + [{0: [EVERYTHING] * 2, 1: [[1], [1]]}] * 2,
        "branches.0.weight, branches.0.bias, branches.2.weight, branches.2.bias on rank 1",
    ),
    "nowhere": ([{0: [EVERYTHING, [0]], 1: [[1], EVERYTHING]}] * 3, ""),
}


def _run(
    rank: int, world_size: int, steps: list[Step], find_unused: bool
) -> tuple[list[Any], str, list[Any]]:
    """The gradients of each step, what was found, and the guard's reasons."""
    world = World(rank=rank, local_rank=rank, world_size=world_size, device=torch.device("cpu"))
    network = distribute(Branches(), ParallelConfig(find_unused=find_unused), world)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0, fused=True)
    guard = StepGuard(network, optimizer, max_norm=None)
    runner = StepRunner(
        model=network,
        task=Task(model=plain(network), loss=loss, train_data=[], val_data=[]),
        guard=guard,
        faults=FaultInjector(NO_FAULTS, model=plain(network), rank=rank),
        unused=UnusedParameters(network),
        device=world.device,
        precision="fp32",
        world_size=world_size,
        nominal_tokens=6,
        num_passes=len(steps[0][rank]),
        progress=Progress(),
        timer=StepTimer(torch.device("cpu")),
    )
    gradients = []
    for number, step in enumerate(steps):
        micro_batches = [
            {
                "x": torch.randn(
                    3, 4, generator=torch.Generator().manual_seed(number * 4 + rank * 2 + index)
                ),
                "used": torch.tensor(used),
            }
            for index, used in enumerate(step[rank])
        ]
        runner.run(number, micro_batches)
        gradients.append(
            {
                n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
                for n, p in plain(network).named_parameters()
            }
        )
        guard.step(nominal_tokens=6)
        optimizer.zero_grad()
    reasons = [record.reason for record in guard.drain(wait=True)]
    guard.close()
    try:
        runner.unused.refuse()
    except ConfigError as error:
        return gradients, str(error), reasons
    return gradients, "", reasons


def compare(rank: int, world_size: int) -> list[str]:
    """Every case without DDP's search, against the same with it; what was wrong."""
    wrong = []
    for case, (steps, said) in CASES.items():
        gradients, error, reasons = _run(rank, world_size, steps, False)
        searched, nothing, _ = _run(rank, world_size, steps, True)
        for number, (one, other) in enumerate(zip(gradients, searched, strict=True)):
            wrong += [f"{case}: {n} in step {number}" for n in one if not torch.equal(one[n], other[n])]
        expected = f"the loss does not depend on {said}: DDP reduces" if said else ""
        if not error.startswith(expected) or bool(error) != bool(said) or nothing:
            wrong.append(f"{case}: {error!r}, with the search {nothing!r}")
        if any(reasons):
            wrong.append(f"{case}: {reasons}")
    return wrong


def test_no_rank_waits_and_all_name_what_was_unused() -> None:
    assert run_ranks(compare, 2) == [[], []]


def watched(rank: int, world_size: int) -> list[int]:
    """How many parameters call into Python in each backward pass."""
    world = World(rank=rank, local_rank=rank, world_size=world_size, device=torch.device("cpu"))
    counts = []
    for parallel in (ParallelConfig(), ParallelConfig(find_unused=True), ParallelConfig(strategy="fsdp")):
        network = distribute(Branches(), parallel, world)
        UnusedParameters(network)
        counts.append(sum(bool(p._post_accumulate_grad_hooks) for p in network.parameters()))  # type: ignore[attr-defined]
    return counts


def test_nothing_is_watched_where_no_rank_waits() -> None:
    assert run_ranks(watched, 2) == [[9, 0, 0]] * 2
