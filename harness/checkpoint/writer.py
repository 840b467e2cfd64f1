"""The save that goes on while training does: one thread, one group of its own, one attempt at a time."""

from __future__ import annotations

import logging
import platform
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import harness
from harness.checkpoint.adapters import Soundness
from harness.checkpoint.layout import shard_name
from harness.checkpoint.manifest import Manifest, ShardFile, TensorInfo
from harness.checkpoint.shards import write_shard
from harness.checkpoint.staging import Staging
from harness.checkpoint.store import Saved, Store
from harness.checkpoint.tasks import Tasks
from harness.dist import HostGroup
from harness.errors import CheckpointError, HarnessError

__all__ = ["Job", "SaveOutcome", "Writer"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveOutcome:
    """How a save ended. The same on all ranks, but for the times."""

    step: int
    error: HarnessError | None
    """Why there is no checkpoint; None if there is one."""
    path: Path | None
    blocked_s: float
    """How long training waited for it."""
    seconds: float
    """From the call to the end, training's own time included."""
    size_bytes: int
    """Of all ranks' files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything that the thread needs; nothing in it is changed by training."""

    step: int
    staging: Staging
    stage: Callable[[], None]
    """Fills the staging; does nothing if that has been done already."""
    state: dict[str, Any]
    rank_state: dict[str, Any]
    checked: Mapping[str, Soundness]
    """Descriptions, and the tensors that have to be finite: see `Captured`."""
    tensors: dict[str, TensorInfo]
    """Where all ranks' tensors lie; on rank 0 only."""
    meta: dict[str, Any]
    metric: float | None
    began: float
    """`time.perf_counter()` at the call."""
    blocked_s: float


class Writer:
    """Writes and commits one job after the other.

    Args:
        group: Used by the thread alone.
        tasks: What there is to do after commits. It is done before the next attempt takes more of the disk,
            and while training goes on.
        tasks_s: How long that may take, or the attempt fails.
        committed: Called on rank 0, in the thread, after each commit.
    """

    def __init__(
        self,
        store: Store,
        group: HostGroup,
        tasks: Tasks,
        *,
        tasks_s: float,
        committed: Callable[[Saved], None],
    ) -> None:
        self._tasks_s = tasks_s
        self._store, self._group, self._tasks, self._committed = store, group, tasks, committed
        self._thread: threading.Thread | None = None
        self._outcomes: deque[SaveOutcome] = deque()
        self.written_bytes = 0
        """Of all jobs so far, on this rank."""
        self.failed: HarnessError | None = None
        """The last save's error, until it is taken away by whoever raises it."""
        self.failing_since: float | None = None
        """When the oldest attempt began (`time.monotonic()`) after which nothing was committed."""

    @property
    def busy(self) -> bool:
        """Whether a job is under way."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, job: Job) -> None:
        """Begins a job; the one before has to be done."""
        assert not self.busy
        self.failing_since = self.failing_since or time.monotonic()
        # A daemon: a disk that hangs must not keep the process from ending. `join` is called at exit.
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint", daemon=True)
        self._thread.start()

    def join(self, timeout_s: float | None = None) -> bool:
        """Waits for the job under way, if there is one; whether it is done."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return not self.busy

    def settle(self, timeout_s: float) -> bool:
        """As `join`, and waits for the tasks as well."""
        return self.join(timeout_s) and self._tasks.join(timeout_s)

    def take_outcomes(self) -> list[SaveOutcome]:
        """The saves that ended since the last call."""
        # One by one: the thread may add one meanwhile.
        return [self._outcomes.popleft() for _ in range(len(self._outcomes))]

    def _run(self, job: Job) -> None:
        saved, size_bytes, error = None, 0, None
        try:
            saved, size_bytes = self._save(job)
            self.failing_since = None
        except HarnessError as failure:
            error = failure
        except Exception as failure:  # noqa: BLE001  (a lost connection; reported, and the next save tries again)
            error = CheckpointError(f"{type(failure).__name__}: {failure}")
        if error is not None:
            logger.error("step %d was not saved: %s", job.step, error)
        self.failed = error
        self._outcomes.append(
            SaveOutcome(
                step=job.step,
                error=error,
                path=saved.path if saved else None,
                blocked_s=job.blocked_s,
                seconds=time.perf_counter() - job.began,
                size_bytes=size_bytes,
            )
        )

    def _save(self, job: Job) -> tuple[Saved, int]:
        self._group.on_all_ranks(job.stage)
        self._group.on_all_ranks(lambda: job.staging.check_sound(job.checked))
        folder = self._group.from_main(lambda: self._begin(job.step))
        try:
            shares = self._group.gather(lambda: self._write(folder, job))
            saved = self._group.from_main(lambda: self._store.commit(folder, self._manifest(job, shares)))
        except Exception:
            if self._group.is_main:
                self._store.discard(folder)
            raise
        if self._group.is_main:
            self._committed(saved)
        return saved, sum(file.size_bytes for file, _ in shares)

    def _begin(self, step: int) -> Path:
        if not self._tasks.join(self._tasks_s):
            raise CheckpointError(
                f"after {self._tasks_s:g} s old checkpoints are still being marked or deleted",
                rule="a new one is not begun before, or the disk might hold too many",
                remedy=f"check whether {self._store.directory} answers; the next save tries again",
            )
        return self._store.begin(step)

    def _write(self, folder: Path, job: Job) -> tuple[ShardFile, dict[str, Any]]:
        path = folder / shard_name(self._group.rank)
        shard = write_shard(path, job.staging.layout, job.staging.data, self._count)
        return shard, job.rank_state

    def _count(self, num_bytes: int) -> None:
        self.written_bytes += num_bytes

    def _manifest(self, job: Job, shares: list[tuple[ShardFile, dict[str, Any]]]) -> Manifest:
        return Manifest(
            step=job.step,
            world_size=self._group.size,
            created=time.time(),
            metric=job.metric,
            meta=job.meta,
            versions={
                "harness": harness.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            files={shard_name(rank): file for rank, (file, _) in enumerate(shares)},
            tensors=job.tensors,
            state=job.state,
            rank_state={key: [share[key] for _, share in shares] for key in job.rank_state},
        )
