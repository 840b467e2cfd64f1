"""Somebody else's faults: those that the fault kit of lm-resiliency injects into a run on this machine.

Its local executor corrupts what flows through a module (input, output, gradient) or what stands in memory
(weight, bias, optimizer state) of one rank. What flows is struck in one call, as by a fault of arithmetic;
what stands is struck for one iteration, and put back by the kit itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.config import TrainConfig
from harness.data import LossSum, Task
from harness.dist import World, plain
from harness.errors import HarnessError
from harness.runlog.events import Finding, Incident
from harness.runlog.reader import open_run
from harness.stability.checks.fingerprint import fingerprint
from harness.training.loop import Run
from tests.support.own_tasks import Points, own_config, run_loop

__all__ = ["CLEAN", "Cell", "Outcome", "Trained", "all_cells", "judge", "train_cells"]

FLOWS = ("input", "output", "gradient")
STANDING = ("weight", "bias", "optimizer_state")
MAGNITUDES = ("near_invisible", "subtle", "medium", "large", "catastrophic")
WITH_MAGNITUDE = ("single_bitflip", "multi_bitflip", "scale", "noise")
RANK = 1
"""That is struck."""
ITERATION = 3
"""Counted from 1."""
MODULE = "middle"
STEPS = 5


@dataclass(frozen=True, slots=True)
class Cell:
    """A fault."""

    type: str
    surface: str
    operation: str = ""
    magnitude: str = ""

    @property
    def name(self) -> str:
        return ", ".join(filter(None, (self.type, self.surface, self.operation, self.magnitude)))


CLEAN = Cell("none", "")


@dataclass(frozen=True, slots=True)
class Trained:
    """What a rank has of a cell."""

    bits: tuple[int, ...]
    """Of parameters and moments at the end."""
    was_injected: bool
    problem: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a cell."""

    was_injected: bool
    changes: bool
    """Whether the end state is not that of the undisturbed run, on some rank."""
    by: tuple[str, ...]
    """What said it, in words; empty: nothing did."""
    ranks: tuple[int, ...]
    """That were named."""
    problem: str

    @property
    def is_detected(self) -> bool:
        return bool(self.by)

    @property
    def is_right_rank(self) -> bool:
        return bool(self.ranks) and set(self.ranks) == {RANK}


def all_cells() -> list[Cell]:
    """Every type, surface and magnitude that the local executor supports."""
    cells = []
    for surface in (*FLOWS, *STANDING):
        for operation in WITH_MAGNITUDE:
            cells += [Cell("tensor_corruption", surface, operation, one) for one in MAGNITUDES]
        cells += [Cell("tensor_corruption", surface, operation) for operation in ("sign_flip", "set_value")]
        cells += [Cell(kind, surface) for kind in ("stale_state", "duplicate")]
    cells += [Cell(kind, surface) for kind in ("drop", "reorder") for surface in FLOWS]
    return cells + [Cell("delay", surface) for surface in ("input", "output", "compute")]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 16)
        self.middle = nn.Linear(16, 16)
        self.last = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.gelu(self.middle(F.gelu(self.first(x)))))


def loss(model: nn.Module, batch: dict[str, Tensor]) -> LossSum:
    return LossSum((model(batch["x"]) - batch["y"]).square().sum(), len(batch["x"]))


def task(config: TrainConfig) -> Task:
    return Task(model=Net(), loss=loss, train_data=Points(96), val_data=Points(8))


def train_cells(rank: int, size: int, folder: str, cells: Sequence[Cell]) -> list[Trained]:
    """One rank of a run for each cell."""
    return [_train(rank, size, Path(folder) / str(number), cell) for number, cell in enumerate(cells)]


def _train(rank: int, size: int, folder: Path, cell: Cell) -> Trained:
    settings = (
        "--optim.name=adamw",
        "--optim.lr=0.001",
        f"--loop.steps={STEPS}",
        f"--loop.global_batch={4 * size}",
        "--guard.replicas_every=1",
        "--guard.state_every=1",
        "--incidents.recompute_every=1",
        "--incidents.enabled=false",
        "--guard.max_consecutive_skips=100",
        "--guard.max_skip_frac=1",
    )
    world = World(rank=rank, local_rank=rank, world_size=size, device=torch.device("cpu"))
    session: list[Any] = []

    def begin(run: Run) -> None:
        if cell != CLEAN:
            session.append(_inject(run, cell))

    try:
        run = run_loop(own_config(folder, task, *settings), world, begin=begin)
    except HarnessError as error:
        return Trained((), True, str(error).splitlines()[0])
    records = [record for one in session for record in one.records]
    problem = next((record.error for record in records if record.error), "")
    for one in session:
        one.close()
    return Trained(tuple(_bits(run)), any(record.verified for record in records), problem)


def _inject(run: Run, cell: Cell) -> Any:
    """Hangs the kit into a run that is about to begin. On all ranks; calls collectives."""
    from lm_resiliency import fault_injection as kit

    parameters: dict[str, Any] = {}
    if cell.type == "delay":
        parameters["delay_ms"] = 300.0
    if cell.operation:
        parameters["operation"] = cell.operation
    if cell.magnitude:
        parameters["magnitude"] = cell.magnitude
    if cell.operation == "set_value":
        parameters["value"] = 3.0
    lifetime = {"iterations": 1} if cell.surface in STANDING else {"matching_calls": 1}
    fault = kit.FaultSpec(
        fault_id="fault",
        type=kit.FailureType(cell.type),
        target=kit.FaultTarget(surface=kit.FaultSurface(cell.surface), rank=RANK, module_path=MODULE),
        parameters=parameters,
    )
    incident = kit.FaultIncident(
        incident_id="incident",
        trigger=kit.IncidentTrigger(at=(ITERATION,)),
        lifetime=kit.IncidentLifetime(**lifetime),
        faults=(fault,),
    )
    campaign = kit.FaultCampaign(name=cell.name, incidents=(incident,), seed=0)
    return kit.enable_fault_injection(run.model, run.optimizer, campaign=campaign, completed_iterations=0)


def _bits(run: Run) -> Iterator[int]:
    for parameter in plain(run.model).parameters():
        yield int(fingerprint(parameter))
        for _, value in sorted(run.optimizer.state[parameter].items()):
            if isinstance(value, Tensor):
                yield int(fingerprint(value))


def judge(folder: str, number: int, of_ranks: Sequence[Trained], clean: Sequence[Trained]) -> Outcome:
    """What the log of a cell says, and what became of its weights."""
    said, ranks = [], []
    for event in open_run(Path(folder) / str(number) / "runs" / "own").events():
        what = event.what
        if isinstance(what, Incident | Finding):
            said.append(what.summary if isinstance(what, Incident) else what.problem)
            ranks += [what.rank] if what.rank is not None else []
    return Outcome(
        was_injected=any(one.was_injected for one in of_ranks),
        changes=[one.bits for one in of_ranks] != [one.bits for one in clean],
        by=tuple(said),
        ranks=tuple(sorted(set(ranks))),
        problem=next((one.problem for one in of_ranks if one.problem), ""),
    )
