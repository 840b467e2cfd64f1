"""A callback by which one rank hangs, is stopped or is slow, wherever a run can be: for trials."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from harness import env
from harness.config import TrainConfig
from harness.training import Callback

__all__ = ["PLACES", "WAYS", "hangs_as_planned", "plan", "struck_at"]

PLACES = ("start", "loader", "worker", "forward", "backward", "callback", "evaluation", "save", "disk")
WAYS = ("hang", "stop", "slow", "late")
_PLAN = "hang.json"


def plan(folder: Path, *, place: str, way: str, rank: int, count: int, seconds: float) -> None:
    """What is to happen to the run in `folder`.

    Args:
        place: In which the rank is when it happens: `worker` is a process that loads data, `disk` the thread
            that writes a checkpoint.
        way: `hang` for ever, be stopped (`stop`), take `seconds` (`slow`, `late`).
        count: At the how-manieth passing of that place.
    """
    what = {"place": place, "way": way, "rank": rank, "count": count, "seconds": seconds}
    (folder / _PLAN).write_text(json.dumps(what))


def struck_at(folder: Path) -> float | None:
    """When it happened, by `time.time()`; None if it has not."""
    note = folder / "struck"
    return float(note.read_text()) if note.exists() else None


def hangs_as_planned(config: TrainConfig) -> Callback:
    """For `callbacks`."""
    folder = Path(config.runs_dir).parent
    planned = json.loads((folder / _PLAN).read_text())
    hanging = _Hanging(folder, planned)
    if planned["place"] == "start":
        hanging.pass_by("start")
    return hanging


class _Hanging(Callback):
    def __init__(self, folder: Path, planned: dict[str, Any]) -> None:
        self._folder, self._planned = folder, planned
        self._mine = planned["rank"] == env.launched().rank
        self._passed = 0

    def pass_by(self, place: str) -> None:
        """The rank is in a place, in which it may have to stay."""
        if not self._mine or place != self._planned["place"]:
            return
        self._passed += 1
        if self._passed == self._planned["count"]:
            (self._folder / "struck").write_text(str(time.time()))
            self._stay(self._planned["way"])

    def on_step(self, run: Any, record: Any) -> None:
        if record.step == 0 and self._mine:
            self._lie_in_wait(run)
        self.pass_by("callback")

    def state_dict(self) -> dict[str, Any]:
        self.pass_by("save")
        return {}

    def _lie_in_wait(self, run: Any) -> None:
        next(run.model.parameters()).register_hook(lambda gradient: self.pass_by("backward"))
        run.model.register_forward_pre_hook(self._in_forward)
        plain = getattr(run.model, "module", run.model)
        plain.register_forward_pre_hook(self._in_evaluation)
        run.loader.next = _before(lambda: self.pass_by("loader"), run.loader.next)
        if self._planned["place"] == "worker":
            run.loader.next = _before(lambda: self.pass_by("worker"), run.loader.next)
        if self._planned["place"] == "disk":
            os.fsync = _before(self._in_writer, os.fsync)

    def _in_forward(self, module: nn.Module, inputs: Any) -> None:
        if module.training:
            self.pass_by("forward")

    def _in_evaluation(self, module: nn.Module, inputs: Any) -> None:
        if not module.training:
            self.pass_by("evaluation")

    def _in_writer(self) -> None:
        if threading.current_thread().name == "checkpoint":
            self.pass_by("disk")

    def _stay(self, way: str) -> None:
        if self._planned["place"] == "worker":
            for worker in multiprocessing.active_children():
                os.kill(worker.pid or 0, signal.SIGSTOP)
        elif way == "hang":
            threading.Event().wait()
        elif way == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            time.sleep(self._planned["seconds"])


def _before(first: Callable[[], None], then: Callable[..., Any]) -> Callable[..., Any]:
    def both(*args: Any) -> Any:
        first()
        return then(*args)

    return both
