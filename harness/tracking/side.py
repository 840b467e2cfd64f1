"""The side process: follows a run's log into its mirrors, outlives the trainer, and then ends by itself.

It is started by `mirrors.start_mirrors`, reads `close` from its standard input, and otherwise looks every
second whether the trainer still lives. One thread per mirror: a mirror that hangs holds up no other. It
imports no torch.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.tracking.log import log_dir
from harness.tracking.mirror import Mirror, MirrorFollower
from harness.tracking.process import lives
from harness.tracking.settings import MirrorSettings

__all__ = ["followers_for", "main"]

DRAIN_S = 600.0
"""How long mirrors may take after the trainer's end, an upload included, before they are given up."""
WATCH_S = 1.0
NICENESS = 10


def main(run_dir: str, settings_json: str, trainer_pid: int, trainer_start: float, messages_fd: int) -> None:
    """Runs until the trainer is gone or said `close`, and all mirrors are complete or `DRAIN_S` are over."""
    _settle_in(Path(run_dir), messages_fd)
    ended = threading.Event()
    settings = MirrorSettings.from_json(settings_json)
    followers = followers_for(Path(run_dir), settings, ended=ended)
    for follower in followers:
        threading.Thread(target=follower.run, name=follower.name, daemon=True).start()
    threading.Thread(target=_wait_for_close, args=(ended,), daemon=True).start()
    while not ended.wait(WATCH_S):
        if not lives(trainer_pid, trainer_start):
            ended.set()
    deadline = time.monotonic() + DRAIN_S
    for follower in followers:
        if not follower.done.wait(max(0.0, deadline - time.monotonic())):
            logging.getLogger(__name__).warning(
                "%s is incomplete; `harness sync %s` completes it", follower.name, run_dir
            )
    os._exit(0)  # a hanging mirror's thread, or its library's, would keep the interpreter alive


def followers_for(run_dir: Path, settings: MirrorSettings, *, ended: threading.Event) -> list[MirrorFollower]:
    """One follower for each mirror that the settings ask for."""
    followers = []
    if settings.tensorboard:
        open_tensorboard = functools.partial(_open_tensorboard, run_dir, settings)
        followers.append(MirrorFollower(run_dir, "tensorboard", open_tensorboard, ended=ended))
    if settings.wandb != "off":
        open_wandb = functools.partial(_open_wandb, run_dir, settings)
        followers.append(MirrorFollower(run_dir, "wandb", open_wandb, ended=ended))
    return followers


def _open_tensorboard(run_dir: Path, settings: MirrorSettings, state: Mapping[str, Any]) -> Mirror:
    from harness.tracking.tensorboard import TensorBoardMirror

    folder = Path(settings.tensorboard_dir) if settings.tensorboard_dir else run_dir / "tensorboard"
    return TensorBoardMirror(folder, run_dir=run_dir, state=state)


def _open_wandb(run_dir: Path, settings: MirrorSettings, state: Mapping[str, Any]) -> Mirror:
    from harness.tracking.wandb import WandbMirror

    return WandbMirror(settings, run_dir=run_dir, run_id=_run_id(run_dir, settings), state=state)


def _run_id(run_dir: Path, settings: MirrorSettings) -> str:
    """The same for every attempt and every later `harness sync`."""
    kept = log_dir(run_dir) / "mirrors" / "wandb-run-id"
    if settings.run_id is not None:
        return settings.run_id
    if not kept.exists():
        kept.write_text(uuid.uuid4().hex[:12])
    return kept.read_text()


def _settle_in(run_dir: Path, messages_fd: int) -> None:
    """Gives way to the trainer, leaves its terminal alone, and sends messages for people back to it."""
    os.nice(NICENESS)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the trainer may still write its last words after these
    output = os.open(log_dir(run_dir) / "side.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    harness = logging.getLogger("harness")
    harness.setLevel(logging.INFO)
    local = logging.StreamHandler(sys.stderr)
    local.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(name)s %(message)s"))
    harness.addHandler(local)
    os.set_blocking(messages_fd, False)
    harness.addHandler(_Messenger(messages_fd))
    threading.excepthook = lambda arguments: traceback.print_exception(arguments.exc_value)


class _Messenger(logging.Handler):
    """One line per warning into a pipe to the trainer; dropped if nobody reads there."""

    def __init__(self, fd: int) -> None:
        super().__init__(logging.WARNING)
        self._fd = fd

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage().replace("\n", " ")
        try:
            os.write(self._fd, f"{record.levelno} {line}\n".encode(errors="replace")[:4000])
        except OSError:
            self.setLevel(logging.CRITICAL + 1)


def _wait_for_close(ended: threading.Event) -> None:
    for line in sys.stdin:
        if line.strip() == "close":
            ended.set()
