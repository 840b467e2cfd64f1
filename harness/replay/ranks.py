"""All ranks of a run in one process: each in turn makes its share of a step, then the step is decided.

One copy of the model serves them all. What differs between ranks is kept for each: its place in the data, its
random number generators, its buffers and its rehearsed faults. Gradients are combined as DDP or FSDP2 combine
them; for two ranks to the same bits, for more up to the order in which a sum is taken.

Legend: W ranks, P parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.checkpoint import Rng
from harness.checkpoint.read_only import read_into, verified
from harness.checkpoint.store import Saved
from harness.config import FaultConfig, TrainConfig
from harness.data import Batch, LossSum, fetch, find_quarantined, seed_everything
from harness.dist import World, compile_model
from harness.records import StepRecord
from harness.replay.judge import Judge, RankShare
from harness.training.agreed import agree_on_data, agree_on_files
from harness.training.buffers import SavedBuffers
from harness.training.build import build_loader, build_runner
from harness.training.counters import Counters
from harness.training.faults import FaultInjector
from harness.training.optim import build_optimizers, set_learning_rate
from harness.training.progress import Progress
from harness.training.schedule import learning_rate
from harness.training.tasks import build_task

__all__ = ["MicroBatch", "Played", "RanksInTurn", "State"]

PROCESS_FAULTS = ("slow", "kill", "hang")

State = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """One forward and backward pass of a step, with all that it depends on beside the weights."""

    step: int
    rank: int
    number: int
    batch: Batch
    """On the device, as the loss got it: what a fault did to it is in it."""
    samples: tuple[int, ...]
    """Indices in the data set, in the order of the batch."""
    rng: State
    buffers: SavedBuffers


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """A step that has been run again."""

    record: StepRecord
    rows: Tensor
    """`[W, P, 6]` statistics of the ranks' own gradients, and of the reduced one."""
    micro_batches: list[MicroBatch]
    """Of all ranks."""


class RanksInTurn:
    """The training state of all ranks of a run, at the beginning of one of its steps.

    Args:
        config: The run's.
        world_size: Ranks that it had.
        device: Where to compute here.
        precision: fp32, bf16 or fp16.
        schedule_steps: Length of the learning-rate schedule; 0: as the configuration says.
        faults: The rehearsed faults that are to strike again.

    Raises:
        HarnessError: the task or its data cannot be had here.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        world_size: int,
        device: torch.device,
        precision: str,
        schedule_steps: int,
        faults: Sequence[FaultConfig],
    ) -> None:
        self.config, self.world_size, self.device, self.precision = config, world_size, device, precision
        self.task = build_task(config, files=agree_on_files(config))
        self.faults = [fault for fault in faults if fault.kind not in PROCESS_FAULTS]
        self.model: nn.Module = self.task.model.to(device)
        compile_model(self.model, config.loop)
        is_sharded = config.parallel.strategy == "fsdp"
        # The kernel in Triton needs CUDA, and is within a rounding of torch's.
        optim = dataclasses.replace(config.optim, fused="torch") if device.type == "cpu" else config.optim
        self._optimizers = build_optimizers(self.model, optim, config.muon, is_sharded=is_sharded)
        self.optimizers = [*self._optimizers.values()]
        self.judge = Judge(self.model, self.optimizers, config, world_size=world_size, precision=precision)
        self.counters = Counters()
        self.fingerprints = agree_on_data(self.task, config)
        """Of the data sets, as they are here."""
        self._task = dataclasses.replace(self.task, loss=self._loss)
        self._schedule_steps = schedule_steps or config.schedule.steps or config.loop.steps
        self.worlds = [self.world_of(rank, world_size, device) for rank in range(world_size)]
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, num_workers=0))
        quarantined = find_quarantined(self.task.train_data, config.data.quarantine)
        self.loaders = [
            build_loader(config, world, self.task, self.fingerprints, quarantined) for world in self.worlds
        ]
        self._injectors = [self.injector(world.rank, self.faults) for world in self.worlds]
        self._rng = [self._first_rng(rank) for rank in range(world_size)]
        self._buffers = [SavedBuffers(self.model)] * world_size
        self._first_buffers = self._buffers[0]
        self.passes: list[MicroBatch] = []
        """The micro-batches of the last step."""
        self._passes: list[MicroBatch] | None = None
        self._num_blank = 0
        """Passes to come that are no micro-batch's."""
        self._rank, self._step = 0, 0

    @property
    def nominal_tokens(self) -> int:
        """Tokens of a global batch without padding."""
        return self.config.loop.global_batch * self.task.tokens_per_sample

    @property
    def step(self) -> int:
        """The next step."""
        return self.counters.step

    @staticmethod
    def world_of(rank: int, world_size: int, device: torch.device) -> World:
        """A rank of the run, as it would see itself here."""
        return World(rank=rank, local_rank=0, world_size=world_size, device=device)

    @property
    def position(self) -> int:
        """Of the next step's first sample in the order of the data."""
        return self.loaders[0].position

    @property
    def rng(self) -> Mapping[int, State]:
        """The states of the ranks' generators before the next step."""
        return dict(enumerate(self._rng))

    def learning_rate(self, step: int) -> float:
        """The schedule's value at `step`."""
        peak, schedule = self.config.optim.lr, self.config.schedule
        return learning_rate(step, peak=peak, num_steps=self._schedule_steps, schedule=schedule)

    def samples_of(self, rank: int | None, micro_batch: int | None) -> list[int]:
        """Indices of the samples of the last step: of a rank's micro-batch, or of the global batch."""
        first = self.loaders[0].position - self.config.loop.global_batch
        return self.loaders[0].step_indices(first, rank, micro_batch)

    def skip(self, num_samples: int) -> None:
        """Steps over samples of the global order, as a rollback does."""
        for loader in self.loaders if num_samples else ():
            loader.skip(num_samples)

    def load(self, saved: Saved) -> None:
        """Takes over a checkpoint.

        Raises:
            CheckpointError: it is damaged, or of another model.
        """
        manifest = verified(saved)
        state: dict[str, Any] = {
            "model": self.model,
            **self._optimizers,
            "loader": self.loaders[0],
            "guard": self.judge,
            "counters": self.counters,
        }
        read_into(saved, manifest, state)
        for rank, loader in enumerate(self.loaders):
            read_into(saved, manifest, {"loader": loader, "rng": Rng()}, rank=rank)
            self._rng[rank] = Rng().state_dict()
        self._buffers = [SavedBuffers(self.model)] * self.world_size
        for rank, injector in enumerate(self._injectors):
            late = [fault for fault in self.faults if fault.step >= self.step]
            self._injectors[rank] = self.injector(rank, late) if late != self.faults else injector

    def play(self, *, apply: bool = True) -> Played:
        """Runs the next step; all ranks' forward and backward passes, the decision and the update.

        Args:
            apply: False leaves weights, optimizer and buffers as they are, and the step the next one; whether
                the update would have been taken back is found out all the same.
        """
        step = self.step
        set_learning_rate(self.optimizers, self.learning_rate(step))
        self._passes, found = [], self._buffers
        shares = [self._share(world.rank) for world in self.worlds]
        self.judge.combine()
        judged = self.judge.decide(step, shares, nominal_tokens=self.nominal_tokens)
        record = (self.judge.update if apply else self.judge.try_update)(step, judged)
        if apply:
            self.counters.count(record)
            self.counters.step = step + 1
        if record.skipped or not apply:
            self._buffers = found
        passes, self._passes = self._passes, None
        self.passes = passes
        return Played(record=record, rows=judged.rows, micro_batches=passes)

    def injector(self, rank: int, faults: Sequence[FaultConfig]) -> FaultInjector:
        """A rank's faults, each of which strikes once; nothing is noted of them on the disk."""
        return FaultInjector(
            faults, model=self.task.model, rank=rank, sample=lambda: fetch(self.task.train_data, [0])
        )

    @contextmanager
    def as_found_by(self, micro_batch: MicroBatch) -> Iterator[None]:
        """Generators and buffers as they were before a forward pass; afterwards no gradient is left."""
        micro_batch.buffers.put_back()
        Rng().load_state_dict(dict(micro_batch.rng))
        self._zero_grad()
        try:
            yield
        finally:
            self._zero_grad()

    def _zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _share(self, rank: int) -> RankShare:
        """What one rank does of the next step: forward and backward passes."""
        step, world = self.step, self.worlds[rank]
        self._rank, self._step = rank, step
        # DDP's ranks take over rank 0's buffers as they begin a step.
        is_replica = self.config.parallel.strategy != "fsdp" and rank > 0
        (self._first_buffers if is_replica else self._buffers[rank]).put_back()
        if rank == 0:
            self._first_buffers = SavedBuffers(self.model)
        Rng().load_state_dict(dict(self._rng[rank]))
        self._zero_grad()
        share = self.judge.share(step, rank)
        runner = build_runner(
            self.config,
            world,
            self._task,
            self.model,
            share,
            self._injectors[rank],
            self.precision,
            Progress(),
        )
        batches = self.loaders[rank].next()
        self._num_blank = runner.num_passes - len(batches)
        runner.run(step, batches)
        share.finish()
        self.judge.add()
        self._rng[rank] = Rng().state_dict()
        self._buffers = [
            SavedBuffers(self.model) if other == rank else one for other, one in enumerate(self._buffers)
        ]
        return share

    def _first_rng(self, rank: int) -> State:
        """A rank's generators at the beginning of a run."""
        seed_everything(self.config.seed + 1 + rank)
        return Rng().state_dict()

    def _loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """The task's loss; on the way notes what goes into it."""
        if self._num_blank > 0:
            self._num_blank -= 1
        elif self._passes is not None:
            number = sum(one.rank == self._rank for one in self._passes)
            loader = self.loaders[self._rank]
            first = loader.position - self.config.loop.global_batch
            self._passes.append(
                MicroBatch(
                    step=self._step,
                    rank=self._rank,
                    number=number,
                    batch=batch,
                    samples=tuple(loader.step_indices(first, self._rank, number)),
                    rng=Rng().state_dict(),
                    buffers=SavedBuffers(model),
                )
            )
        return self.task.loss(model, batch)
