"""One complete run: the sections and what belongs to none of them.

Each section checks what it can decide alone when it is made; rules that span several are in
`TrainConfig.__post_init__`, and those that need the world's size in `check_world`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from harness.config.checkpoint import CheckpointConfig
from harness.config.checks import require, require_not_negative
from harness.config.data import DataConfig
from harness.config.faults import FaultConfig
from harness.config.guard import GuardConfig
from harness.config.incidents import IncidentsConfig
from harness.config.loop import LoopConfig
from harness.config.model import ModelConfig
from harness.config.muon import MuonConfig
from harness.config.optim import OptimConfig
from harness.config.parallel import ParallelConfig
from harness.config.schedule import ScheduleConfig
from harness.config.straggler import StragglerConfig
from harness.config.tracking import TrackingConfig
from harness.config.watchdog import WatchdogConfig

__all__ = ["TrainConfig"]

MAX_NAME_BYTES = 200
"""Of a run's name: file systems allow 255, and there are files that are named after runs."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One complete run. Without any setting: a small decoder on the Python standard library's source."""

    SECTION = ""

    name: str = "quickstart"
    """Name of the run; its directory is `runs_dir`/`name`."""
    runs_dir: str = "runs"
    """Folder in which runs are kept."""
    resume: Literal["auto", "must", "never"] = "auto"
    """auto: go on with the run if its directory holds one, else start it; must, never: an error otherwise."""
    seed: int = 1234
    """Seed of initialisation, data order, augmentation and dropout, for torch, numpy and Python alike."""
    deterministic: bool = False
    """Only algorithms that give the same bits every time."""
    debug: bool = False
    """One process, synchronous, anomaly detection on, every check every step, a debugger on an incident."""
    dry_run: int = 0
    """Only prepare the data, say how much memory one of so many ranks would need, and start nothing. In one
    process, whatever the number."""
    task: str = "text"
    """text, images, hf, or `package.module:function` for a task of your own."""
    task_args: dict[str, Any] = field(default_factory=dict)
    """What the task's function takes besides the configuration, by name: `--task_args.noise 0.1`, or a
    mapping in a file. Checked against the function's parameters and their types; docs/tasks.md."""
    callbacks: tuple[str, ...] = ()
    """`package.module:function` each, called with the configuration: they return a `harness.Callback`, whose
    hooks are called at set points of the loop; docs/extending.md."""
    data: DataConfig = field(default_factory=DataConfig)
    """Data."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Model."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer."""
    muon: MuonConfig = field(default_factory=MuonConfig)
    """Muon."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning-rate schedule."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """Loop."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Parallelism."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """Stability guard."""
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    """Watchdog."""
    incidents: IncidentsConfig = field(default_factory=IncidentsConfig)
    """Incidents."""
    straggler: StragglerConfig = field(default_factory=StragglerConfig)
    """Stragglers."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Tracking."""
    faults: tuple[FaultConfig, ...] = ()
    """Faults to inject; loud when there are any."""

    def __post_init__(self) -> None:
        require(self, "name", bool(self.name.strip()), "a run needs a name, of more than blanks")
        require(
            self,
            "name",
            len(self.name.encode(errors="surrogateescape")) <= MAX_NAME_BYTES,
            f"it is a folder's name, of at most {MAX_NAME_BYTES} bytes",
        )
        require(
            self,
            "name",
            self.name not in (".", "..") and not set(self.name) & set("/\\\0\n\r\t"),
            "it is one folder's name, without slashes or control characters",
            "use --runs_dir for the folder that it lies in",
        )
        require_not_negative(self, "dry_run")
        require(self, "seed", 0 <= self.seed < 2**63, "it has to be a whole number in [0, 2^63)")
        require(
            self,
            "task",
            self.task in ("text", "images", "hf") or ":" in self.task,
            "it has to be text, images, hf, or package.module:function",
        )
        require(
            self,
            "task_args",
            not self.task_args or self.task not in ("text", "images"),
            f"task {self.task} takes none",
            "its settings are in the sections data and model",
        )
        self._check_model_fits_task()
        self._check_sharding_fits()

    def _check_sharding_fits(self) -> None:
        require(
            self.incidents,
            "recompute_every",
            not self.incidents.recompute_every or self.parallel.strategy != "fsdp",
            "under FSDP2 gradients are reduced as they come, and cannot be compared rank by rank",
            "set it to 0, or parallel.strategy to ddp",
        )
        require(
            self.incidents,
            "rerun",
            self.incidents.rerun == "off" or self.parallel.strategy != "fsdp",
            "sharded models cannot be run without the other ranks' gradients",
            "set it to off, or parallel.strategy to ddp; harness replay does it afterwards",
        )
        require(
            self.parallel,
            "meta_init",
            not self.parallel.meta_init or self.task != "hf",
            "task hf cannot put initialisation off: transformers unties a tied head that has no memory",
            "leave it out: pretrained weights are in memory anyway",
        )
        if self.loop.precision != "auto":
            self.parallel.check_precision(self.loop.precision)

    def _check_model_fits_task(self) -> None:
        wanted = {"text": ("decoder",), "images": ("cnn", "mlp")}.get(self.task)
        if wanted is None:
            return
        require(
            self.model,
            "kind",
            self.model.kind in wanted,
            f"task {self.task} needs one of {', '.join(wanted)}",
        )
        require(
            self.model,
            "vocab_size",
            self.task != "text" or self.model.vocab_size >= 256,
            "task text needs a row for each of the 256 bytes",
        )

    def check_world(self, world_size: int, *, may_be_uneven: bool = False) -> None:
        """Checks the rules that depend on how many processes there are, and what holds at the start only.

        Args:
            may_be_uneven: Whether the number of ranks may change from attempt to attempt: then they may have
                unequal shares of the global batch, another mesh than the configured one, and faults of ranks
                that are gone.

        Raises:
            ConfigError: the global batch cannot be split, the mesh does not fit, a fault strikes a step, rank
                or micro-batch that does not exist, or the debug mode is asked for in several processes.
        """
        self._check_batch(world_size, may_be_uneven=may_be_uneven)
        if self.parallel.strategy == "fsdp":
            self.parallel.mesh_shape(world_size, may_refit=may_be_uneven)
        for fault in self.faults:
            last_step = self.loop.steps - 1
            require(fault, "step", fault.step <= last_step, f"the run's steps are 0 to {last_step}")
        for fault, (key, rule) in self.inert_faults(world_size).items():
            require(fault, key, may_be_uneven, rule)
        require(
            self,
            "debug",
            not (self.debug and world_size > 1),
            f"it runs in one process, and there are {world_size}",
            "start it with `python -m harness.train`",
        )

    def inert_faults(self, world_size: int) -> dict[FaultConfig, tuple[str, str]]:
        """The faults that nothing can strike at this number of ranks: the key that is out of range, and the
        rule."""
        share = world_size * (self.loop.micro_batch or self.loop.global_batch)
        num_micro_batches = max(1, self.loop.global_batch // share)
        inert = {}
        for fault in self.faults:
            if fault.rank >= world_size:
                inert[fault] = ("rank", f"there are only {world_size} ranks")
            elif fault.micro_batch >= num_micro_batches:
                rule = f"a step has {num_micro_batches} on each rank, counted from 0"
                inert[fault] = ("micro_batch", rule)
        return inert

    def _check_batch(self, world_size: int, *, may_be_uneven: bool) -> None:
        micro_batch, global_batch = self.loop.micro_batch or 1, self.loop.global_batch
        share = world_size * micro_batch
        goes_round = global_batch % share == 0
        if may_be_uneven and global_batch >= world_size:
            goes_round = global_batch % micro_batch == 0
        require(
            self.loop,
            "global_batch",
            goes_round,
            f"it has to be a multiple of world size x loop.micro_batch = {world_size} x {micro_batch}",
            f"try --loop.global_batch {-(-global_batch // share) * share}",
        )

    @classmethod
    def from_file(cls, path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
        """Reads a YAML file, or the preset of that name; `overrides` are `section.key=value`, as on the
        command line.

        Raises:
            ConfigError: the file cannot be read, or a key or value is wrong.
        """
        from harness.config.parser import parse

        return parse(cls, ["--config", str(path), *(f"--{override}" for override in overrides)])
