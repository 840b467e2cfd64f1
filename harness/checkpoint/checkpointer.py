"""The checkpointer: saves while training goes on, loads what is intact, on all ranks alike."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import time
import weakref
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from harness.checkpoint.capture import Captured, capture
from harness.checkpoint.health import Health
from harness.checkpoint.layout import SavePlanning
from harness.checkpoint.loading import Loader
from harness.checkpoint.memory import Memory
from harness.checkpoint.retention import Retainer, Retention
from harness.checkpoint.staging import Staging
from harness.checkpoint.store import Saved, Store
from harness.checkpoint.tasks import Tasks
from harness.checkpoint.tree import plain
from harness.checkpoint.writer import Job, SaveOutcome, Writer
from harness.config import CheckpointConfig
from harness.dist import HostGroup
from harness.errors import CheckpointError

__all__ = ["Checkpointer"]

logger = logging.getLogger(__name__)

LOADING_S = 1800.0
"""Ranks read for different times: one file each, whatever the world size was when they were written."""
TASKS_AT_END_S = 10.0
"""How long the end waits for deletions: the next run's first save makes up for those that are left."""


class Checkpointer:
    """Checkpoints of one run in one directory, which all ranks share.

    All ranks make it together and call `save`, `wait`, `load`, `rollback` and `steps` together, at the same
    point of the program; `observe`, `outcomes` and `close` are local. Without a process group it serves one
    process. A context manager: leaving it waits for the save under way.

    Args:
        directory: Made at the first save.
        keep_last: Newest checkpoints that are kept.
        keep_best: Checkpoints with the lowest metric that are kept besides.
        keep_every: Steps whose multiples are kept for ever; 0: none.
        keep_all: Nothing is deleted, nor set aside when a lower step is saved.
        healthy_after: Steps without incident after which a checkpoint is healthy.
        when_busy: What `save` does while another save is under way: wait for it, or drop the new one.
        give_up_after_s: A save that has not succeeded for this long is an error.
        in_memory: Keep two or three copies of each rank's state in host memory, so that a rollback needs no
            disk.
        timeout_s: How long one rank waits for another when all begin a save; while loading half an hour at
            least. While a save is written in the background, which holds up nobody, for `give_up_after_s`.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep_last: int = 3,
        keep_best: int = 0,
        keep_every: int = 0,
        keep_all: bool = False,
        healthy_after: int = 20,
        when_busy: Literal["wait", "drop"] = "wait",
        give_up_after_s: float = 3600.0,
        in_memory: bool = False,
        timeout_s: float = 1800.0,
    ) -> None:
        self._when_busy = when_busy
        self._give_up_after_s, self._timeout_s = give_up_after_s, timeout_s
        self._calls = HostGroup(error=CheckpointError, timeout_s=timeout_s)
        self._store = Store(Path(directory))
        self._tasks = Tasks()
        self._health = Health(
            self._store, self._tasks, healthy_after=healthy_after, is_main=self._calls.is_main
        )
        retention = Retention(keep_last=keep_last, keep_best=keep_best, keep_every=keep_every)
        retainer = None if keep_all else Retainer(self._store, retention)
        # Later than the ranks give up, which they do together and with a reason.
        writes = HostGroup(error=CheckpointError, timeout_s=give_up_after_s + timeout_s)
        committed = functools.partial(_after_commit, self._tasks, self._health, retainer)
        # The others wait for its tasks in `writes`: they have to hear of them before they give up.
        tasks_s = min(timeout_s, give_up_after_s) / 2
        self._writer = Writer(self._store, writes, self._tasks, tasks_s=tasks_s, committed=committed)
        loads = HostGroup(error=CheckpointError, timeout_s=max(timeout_s, LOADING_S))
        self._loader = Loader(self._store, loads)
        self._planning = SavePlanning(self._calls)
        self._staging = Staging()
        self._memory = Memory() if in_memory else None
        self._closed = False
        # Who forgets `close` still gets the last save, or the message why not.
        weakref.finalize(self, _finish, self._writer, self._tasks, give_up_after_s)

    @classmethod
    def from_config(
        cls, directory: str | Path, config: CheckpointConfig, *, timeout_s: float = 1800.0
    ) -> Checkpointer:
        """As a run's configuration says; `timeout_s` is its `parallel.timeout_s`."""
        settings = asdict(config)
        del settings["every"]  # the loop's business: here every `save` is asked for
        return cls(directory, **settings, timeout_s=timeout_s)

    def save(
        self,
        step: int,
        state: MutableMapping[str, Any],
        *,
        meta: Mapping[str, Any] | None = None,
        metric: float | None = None,
        when_busy: Literal["wait", "drop"] | None = None,
    ) -> bool:
        """Saves `state` as of now; returns as soon as it is copied, and writes in the background.

        A save that fails is logged by all ranks, is in `outcomes()`, and makes `wait` and `close` raise;
        training may go on, and the next save tries again.

        Args:
            step: Counts completed steps; names the checkpoint.
            state: Modules (plain, DDP, FSDP2), optimizers, objects with `state_dict` and `load_state_dict`,
                plain data, tensors; `Rng()`, and in `PerRank` whatever differs between ranks.
            meta: Plain JSON data for the manifest.
            metric: The lower, the better, for `keep_best`.
            when_busy: Of this save; None: as all of them. The last save of a run has to wait.

        Returns:
            False if the save was dropped because another one is under way.

        Raises:
            CheckpointError: something in `state` cannot be saved, the ranks are not at the same step, or
                nothing could be saved for `give_up_after_s`.
        """
        began = time.perf_counter()
        if not self._agree_on_start(step, when_busy or self._when_busy):
            logger.warning("step %d is not saved: the save before is still under way", step)
            return False
        captured, plain_meta = self._calls.on_all_ranks(
            lambda: (capture(state, self._calls.rank), plain(dict(meta or {}), "meta"))
        )
        self._planning.update(captured.tensors)
        stage = self._calls.on_all_ranks(lambda: self._copy(step, captured))
        job = Job(
            step=step,
            staging=self._staging,
            stage=stage,
            state=captured.state,
            rank_state=captured.rank_state,
            checked=captured.checked,
            tensors=self._planning.tensor_infos(),
            meta=plain_meta,
            metric=metric if metric is None or math.isfinite(metric) else None,
            began=began,
            blocked_s=time.perf_counter() - began,
        )
        self._writer.start(job)
        return True

    def wait(self) -> None:
        """Waits until the save under way is committed, and what it makes superfluous is gone.

        Raises:
            CheckpointError: it failed, or is not done after `give_up_after_s`.
        """
        self._settle()
        self._calls.on_all_ranks(self._raise_failure)

    def load(
        self,
        state: MutableMapping[str, Any],
        *,
        step: int | None = None,
        healthy: bool = False,
        pick: Callable[[list[Saved]], list[Saved]] | None = None,
    ) -> int | None:
        """Loads the newest intact checkpoint into `state`, at whatever world size it was saved.

        Sizes and checksums of all files are compared before anything live is changed. A damaged checkpoint
        is reported, set aside by renaming, and the next older one is used. Plain data is replaced in `state`.
        Keys of the checkpoint that `state` has not are left alone.

        Args:
            state: As for `save`.
            step: This checkpoint and no other.
            healthy: Only one that `observe` has found healthy.
            pick: Instead of both: chooses from those that there are, the best first. Asked on rank 0.

        Returns:
            The checkpoint's step; None if there is none at all.

        Raises:
            CheckpointError: it is of another model, has no such step, or all there are are damaged.
        """
        self._settle()
        manifest = self._loader.load(state, step=step, healthy=healthy, pick=pick)
        self._health.restart()
        if self._memory is not None:
            self._memory.clear()
        return manifest.step if manifest else None

    def rollback(self, state: MutableMapping[str, Any]) -> int:
        """Goes back to the last healthy state, from memory if it is there, else from disk.

        Newer checkpoints are of a branch that is left: they are set aside, and deleted once a healthy
        checkpoint has overtaken them.

        Returns:
            The step gone back to.

        Raises:
            CheckpointError: there is no healthy state, or it does not fit into `state`.
        """
        self._settle()
        step = self._restore_from_memory(state)
        if step is None:
            manifest = self._loader.load(state, step=None, healthy=True)
            if manifest is None:
                raise CheckpointError(
                    f"there is no healthy checkpoint in {self._store.directory} to go back to",
                    rule="a checkpoint is healthy once enough steps without incident have followed it",
                )
            step = manifest.step
        self._health.restart()
        if self._memory is not None:
            self._memory.clear(keep_good=True)
        self._calls.from_main(lambda: self._store.abandon(after=step))
        return step

    def observe(self, step: int, *, incident: bool = False) -> None:
        """Tells that `step` has been completed, with or without an incident. Local and cheap.

        To be called on all ranks with the same values, in order, as late as the verdicts come. A checkpoint
        is healthy once `healthy_after` steps without incident have followed it.
        """
        proved = self._health.observe(step, incident=incident)
        if self._memory is not None and proved is not None:
            self._memory.promote(proved)

    @property
    def written_bytes(self) -> int:
        """What this rank has written so far: a save that goes on, however slowly, makes it grow."""
        return self._writer.written_bytes

    def outcomes(self) -> list[SaveOutcome]:
        """The saves that have ended since the last call. Local."""
        return self._writer.take_outcomes()

    def steps(self) -> list[int]:
        """The steps of all committed checkpoints, in order."""
        return self._calls.from_main(lambda: sorted({saved.step for saved in self._store.saved()}))

    def close(self, *, after_error: bool = False) -> None:
        """Waits for the save under way. Local, for it is called when a rank is in trouble too. Idempotent.

        Args:
            after_error: Other ranks, or the disk, may be the trouble: waits for `timeout_s` at most.

        Raises:
            CheckpointError: it failed, or is not done after `give_up_after_s`.
        """
        if self._closed:
            return
        self._closed = True
        longest_s = min(self._give_up_after_s, self._timeout_s) if after_error else self._give_up_after_s
        _finish(self._writer, self._tasks, longest_s)
        self._raise_failure()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # A failed save has been logged; the error under way is the one to be seen.
        with contextlib.suppress(CheckpointError) if error is not None else contextlib.nullcontext():
            self.close(after_error=error is not None)

    def _agree_on_start(self, step: int, when_busy: Literal["wait", "drop"]) -> bool:
        """Waits until all ranks can begin; False if the save is to be dropped."""
        ranks = self._calls.gather(lambda: (step, self._writer.busy, self._overdue()))
        steps = {step for step, _, _ in ranks}
        if len(steps) > 1:
            raise CheckpointError(f"the ranks save the steps {sorted(steps)}", rule="all save the same one")
        if any(overdue for _, _, overdue in ranks):
            raise self._given_up()
        if any(busy for _, busy, _ in ranks):
            if when_busy == "drop":
                return False
            self._writer.join(self._give_up_after_s)
            self._check_all(not self._writer.busy)
        return True

    def _settle(self) -> None:
        """Waits for the save under way and the tasks, but not for ever: a disk may hang."""
        self._check_all(self._writer.settle(self._give_up_after_s))

    def _check_all(self, is_done: bool) -> None:
        if not all(self._calls.gather(lambda: is_done)):
            raise self._given_up()

    def _copy(self, step: int, captured: Captured) -> Callable[[], None]:
        """Copies what has to be copied before training may go on; gives what is left to be done."""
        layout = self._planning.mine
        if self._memory is None:
            self._staging.fill(layout, captured.tensors)
            return lambda: None
        snapshot = self._memory.take(step, captured)
        return lambda: self._staging.fill(layout, snapshot.tensors)

    def _restore_from_memory(self, state: MutableMapping[str, Any]) -> int | None:
        good = self._memory.good if self._memory is not None else None
        mine = good.step if good is not None else None
        if good is None or any(step != mine for step in self._calls.gather(lambda: mine)):
            return None
        self._loader.restore(good, state)
        return good.step

    def _overdue(self) -> bool:
        since = self._writer.failing_since
        return since is not None and time.monotonic() - since > self._give_up_after_s

    def _given_up(self) -> CheckpointError:
        last = self._writer.failed
        why = last.problem if last else "the save under way does not end"
        return CheckpointError(
            f"nothing could be saved for {self._give_up_after_s:g} s: {why}",
            rule="a run that can save nothing for so long is stopped (checkpoint.give_up_after_s)",
            remedy=f"check the free space and the permissions of {self._store.directory}, then start again: "
            "the run resumes from the last checkpoint",
        )

    def _raise_failure(self) -> None:
        if self._writer.busy:
            raise self._given_up()
        failed, self._writer.failed = self._writer.failed, None
        if failed is not None:
            raise failed


def _finish(writer: Writer, tasks: Tasks, longest_s: float) -> None:
    """Waits for the save under way, and for deletions no longer than they are worth."""
    if writer.join(longest_s):
        tasks.join(min(longest_s, TASKS_AT_END_S))


def _after_commit(tasks: Tasks, health: Health, retainer: Retainer | None, saved: Saved) -> None:
    """In the writer's thread, on rank 0."""
    tasks.add(functools.partial(health.committed, saved))
    if retainer is not None:
        retainer.abandon(saved)
        tasks.add(retainer.delete_outdated)
