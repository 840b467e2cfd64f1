"""Writes what a rank knows of an incident into its folder; see `harness.runlog.incident_files` for the files.

Each rank writes its own files, and rank 0 what happened. What cannot be written is left out and said: an
incident that is not kept is no reason to end a run.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from harness.config import IncidentsConfig
from harness.data import Batch
from harness.dist import World
from harness.errors import TrackingError
from harness.records import RankRow, StepRecord
from harness.runlog.incident_files import (
    BATCH,
    INCIDENT,
    MEMORY,
    REPLAY,
    SNAPSHOT,
    STACKS,
    STORY,
    TRACE,
    IncidentFile,
    RankFile,
    RememberedStep,
    RngStates,
    hang_folders,
    incident_steps,
    rank_path,
    read_incident,
    write_json,
    write_rank,
    write_rng,
)
from harness.runlog.paths import incident_dir
from harness.training.rng_states import HeldRng, digest
from harness.training.step_profiler import ProfiledStep

__all__ = ["Found", "HeldStep", "IncidentWriter"]

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class HeldStep:
    """A step in the ring."""

    step: int
    position: int
    rng: HeldRng
    batches: Sequence[Batch] = ()
    """Until the verdict is known; after the step's end only where `incidents` asks for them."""
    step_s: float | None = None
    verdict: str | None = None
    row: RankRow | None = None
    rerun: tuple[str, ...] = ()
    """What came of running a micro-batch of it again."""

    def copy(self) -> HeldStep:
        """As it is now."""
        return replace(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """An incident, as a rank finds it."""

    step: int
    kind: str
    reason: str
    record: StepRecord | None = None
    ranks: tuple[int, ...] = ()
    """Culprits, where no record says it."""
    error: str | None = None
    phase: str | None = None
    is_in_step: bool = True
    """It happened to the step and its samples; False: between steps, as in an evaluation."""
    stacks: str | None = None
    """A traceback."""
    hang_folder: str | None = None
    """Where the watchdog has written the stacks of all threads."""


class IncidentWriter:
    """One rank's.

    Args:
        directory: The run's.
        describe: Makes `incident.json` of what was found, and of the global position of the step's first
            sample; None: it has nothing to do with samples.
        samples: This rank's samples of the step that began at a global position, by micro-batch.
        sweeps: This rank removes folders that are too many.
    """

    def __init__(
        self,
        config: IncidentsConfig,
        world: World,
        directory: Path,
        *,
        describe: Callable[[Found, int | None], IncidentFile],
        samples: Callable[[int], tuple[tuple[int, ...], ...]],
        sweeps: bool,
    ) -> None:
        self._config, self._directory = config, directory
        self._rank, self._world_size = world.rank, world.world_size
        self._describe, self._samples, self._sweeps = describe, samples, sweeps
        self._started = time.time()
        self._left_out: dict[str, str] = {}

    def write(self, found: Found, steps: Sequence[HeldStep], *, overwrite: bool) -> None:
        """Writes this rank's files; and what happened, unless that stands there and `overwrite` is false.

        Raises:
            OSError: the disk is full, gone or read-only.
        """
        folder = self._folder(found.step)
        self._clear(folder, except_memory=found.kind == "out of memory")
        states = [self._remembered(held) for held in steps]
        write_rng(folder, self._rank, _by_digest(state for _, state in states))
        if found.stacks is not None:
            rank_path(folder, STACKS, self._rank).write_text(found.stacks)
        self._save_batch(folder, found, steps)
        held = _held(found, steps)
        rerun = () if held is None else held.rerun
        write_rank(folder, replace(self._rank_file(found, tuple(step for step, _ in states)), rerun=rerun))
        if overwrite or not self._is_described(folder):
            self._write_incident(folder, self._describe(found, held.position if held else None))
        if self._sweeps:
            self._sweep(folder, *([Path(found.hang_folder)] if found.hang_folder else []))

    def write_memory(self, step: int, model: nn.Module, device: torch.device) -> None:
        """What memory was taken by when an allocation failed; raises nothing."""
        try:
            folder = self._folder(step)
            write_json(rank_path(folder, MEMORY, self._rank), _memory(model, device))
            if device.type == "cuda":
                path = rank_path(folder, SNAPSHOT, self._rank)
                torch.cuda.memory._dump_snapshot(str(path))
                self._require_size(path)
        except Exception as error:  # noqa: BLE001  (said; the error that is under way counts for more)
            logger.warning("what memory was taken by could not be written down: %s", error)

    def write_trace(self, profiled: ProfiledStep) -> None:
        """Writes a profiler's trace.

        Raises:
            OSError: the disk is full, gone or read-only.
        """
        path = rank_path(self._folder(profiled.step), TRACE, self._rank)
        profiled.profiler.export_chrome_trace(str(path))
        self._require_size(path)
        if self._sweeps:
            self._sweep(path.parent)

    def _folder(self, step: int) -> Path:
        folder = incident_dir(self._directory, step)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _clear(self, folder: Path, *, except_memory: bool) -> None:
        """Removes what this rank left there of an earlier attempt, or of a branch that was rolled back."""
        names = [STACKS, BATCH] if except_memory else [STACKS, BATCH, MEMORY, SNAPSHOT]
        for name in names:
            rank_path(folder, name, self._rank).unlink(missing_ok=True)
        self._left_out = {}

    def _remembered(self, held: HeldStep) -> tuple[RememberedStep, RngStates]:
        states, row = held.rng.plain(), held.row
        remembered = RememberedStep(
            step=held.step,
            position=held.position,
            samples=self._samples(held.position),
            rng={name: digest(state) for name, state in states.items()},
            step_s=held.step_s,
            verdict=held.verdict,
        )
        if row is None:
            return remembered, states
        of_row = ("loss", "grad_norm", "num_nan", "num_inf", "compute_s", "data_wait_s")
        return replace(remembered, **{name: getattr(row, name) for name in of_row}), states

    def _rank_file(self, found: Found, steps: tuple[RememberedStep, ...]) -> RankFile:
        return RankFile(
            rank=self._rank,
            world_size=self._world_size,
            step=found.step,
            host=platform.node(),
            pid=os.getpid(),
            steps=steps,
            error=found.error,
            phase=found.phase,
            left_out=self._left_out,
        )

    def _save_batch(self, folder: Path, found: Found, steps: Sequence[HeldStep]) -> None:
        """The micro-batches of a culprit; all that it had where it is not known which one it was."""
        if not self._config.save_batch:
            return
        blamed = found.record.culprits if found.record else ()
        ranks = {one.rank: one.micro_batch for one in blamed} or dict.fromkeys(found.ranks)
        held = _held(found, steps)
        if held is None or (ranks and self._rank not in ranks):
            return
        only = ranks.get(self._rank)
        tensors = {
            f"micro_batch_{number}/{name}": tensor
            for number, batch in enumerate(held.batches)
            if only in (None, number)
            for name, tensor in _tensors(batch)
        }
        path = rank_path(folder, BATCH, self._rank)
        if sum(tensor.nbytes for tensor in tensors.values()) > self._config.max_bytes // self._world_size:
            self._left_out[path.name] = "larger than this rank's share of incidents.max_bytes"
            return
        try:
            save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, path)
        except Exception as error:  # noqa: BLE001  (sparse tensors, a full disk: the rest counts for more)
            self._left_out[path.name] = f"{type(error).__name__}: {error}"

    def _is_described(self, folder: Path) -> bool:
        """Whether a rank of this attempt has written what happened."""
        try:
            return read_incident(folder).time >= self._started
        except TrackingError:
            return False  # there is none, or none that can be read

    def _write_incident(self, folder: Path, what: IncidentFile) -> None:
        for stale in (REPLAY, STORY):  # they are about what stood here before
            (folder / stale).unlink(missing_ok=True)
        write_json(folder / INCIDENT, what)

    def _require_size(self, path: Path) -> None:
        size = path.stat().st_size
        if size > self._config.max_bytes // self._world_size:
            path.unlink()
            logger.warning("%s is left out: %d bytes are too many (incidents.max_bytes)", path.name, size)

    def _sweep(self, *newest: Path) -> None:
        """Removes the oldest folders, of steps and of hangs, while there are too many, or too many bytes."""
        folders = [incident_dir(self._directory, step) for step in incident_steps(self._directory)]
        folders += hang_folders(self._directory)
        others = sorted((folder for folder in folders if folder not in newest), key=_goes_first)
        sizes = {folder: _size(folder) for folder in folders}
        while others and (len(sizes) > self._config.keep or sum(sizes.values()) > self._config.max_bytes):
            oldest = others.pop(0)
            del sizes[oldest]
            shutil.rmtree(oldest, ignore_errors=True)


def _held(found: Found, steps: Sequence[HeldStep]) -> HeldStep | None:
    """The step that an incident happened to, if it is remembered."""
    if not found.is_in_step:
        return None
    return next((held for held in reversed(steps) if held.step == found.step), None)


def _goes_first(folder: Path) -> tuple[bool, float]:
    """By age; overflows of an fp16 loss scale, of which a run has many, before all others."""
    with suppress(TrackingError, OSError):
        what = read_incident(folder)
        return what.kind != "fp16 overflow", what.time
    return True, folder.stat().st_mtime if folder.exists() else 0.0


def _size(folder: Path) -> int:
    total = 0
    for path in folder.glob("*"):
        with suppress(OSError):  # gone meanwhile
            total += path.stat().st_size
    return total


def _by_digest(states: Any) -> dict[str, dict[str, Any]]:
    """Each state once: most generators stand still in most steps."""
    found: dict[str, dict[str, Any]] = {}
    for one in states:
        for name, state in one.items():
            found.setdefault(name, {})[digest(state)] = state
    return found


def _tensors(value: Any, name: str = "") -> Sequence[tuple[str, Tensor]]:
    """The tensors in a batch, at whatever depth, by name."""
    if isinstance(value, Tensor):
        return [(name, value)]
    items = (
        value.items()
        if isinstance(value, Mapping)
        else enumerate(value)
        if isinstance(value, list | tuple)
        else ()
    )
    return [pair for key, item in items for pair in _tensors(item, f"{name}.{key}".lstrip("."))]


def _memory(model: nn.Module, device: torch.device) -> dict[str, Any]:
    """Bytes by what they hold."""
    parameters = list(model.parameters())
    process = psutil.Process().memory_info()
    found: dict[str, Any] = {
        "parameter_bytes": sum(p.nbytes for p in parameters),
        "gradient_bytes": sum(p.grad.nbytes for p in parameters if p.grad is not None),
        "buffer_bytes": sum(b.nbytes for b in model.buffers()),
        "process_bytes": process.rss,
        "machine_free_bytes": psutil.virtual_memory().available,
    }
    if device.type == "cuda":
        found["cuda"] = {
            name: value for name, value in torch.cuda.memory_stats(device).items() if "bytes" in name
        }
    return found
