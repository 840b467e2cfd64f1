"""The side process: follows a run's log into its mirrors, outlives the trainer, and then ends by itself.

It is started by `mirrors.start_mirrors`, reads `close` from its standard input, and otherwise looks every
second whether the trainer still lives. `mirrors.complete_mirrors` starts it for a run that has ended,
`mirrors.start_sampler` on other nodes, where there are no mirrors. One thread per mirror: a mirror that hangs
holds up no other. It imports no torch.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
import psutil

from harness.priority import pass_on_to, stop_yielding
from harness.runlog.nodes import NodeLog
from harness.runlog.paths import log_dir
from harness.runlog.process import lives
from harness.runlog.segments import segments
from harness.tracking.alerts import AlertMirror
from harness.tracking.mirror import Mirror, MirroredRun, MirrorFollower
from harness.tracking.registry import load, mirrors_of
from harness.tracking.resources import Sampler, sample_forever
from harness.tracking.settings import MirrorSettings

__all__ = ["complete", "follow", "main", "sample"]

logger = logging.getLogger(__name__)

ALERTS_S = 5.0
"""How long mirrors wait for the last alert."""
ALERTS_POLL_S = 1.0
STUCK_S = 600.0
"""How long a mirror may stand still after the trainer's end, an upload included, before it is given up. Much
may be left to do then: beside a training that keeps all cores busy a mirror gets little of them."""
SYNC_EVERY_S = 30.0
WATCH_S = 1.0


def main(task: str, arguments: str) -> None:
    """Does what `mirrors` asks for: the name of a function here, and its arguments as JSON."""
    tasks: dict[str, Callable[..., None]] = {"follow": follow, "sample": sample, "complete": complete}
    tasks[task](**orjson.loads(arguments))


def follow(*, run_dir: str, settings: str, trainer: tuple[int, float], messages_fd: int) -> None:
    """Keeps the mirrors until the trainer is gone or said `close`, and all are complete or stuck."""
    path, chosen = Path(run_dir), MirrorSettings.from_json(settings)
    _settle_in(path, messages_fd)
    ended, alerts_done = threading.Event(), threading.Event()
    node_log = NodeLog(path)
    alerts = _alerts_follower(path, chosen, node_log, ended=ended)
    mirrors = _followers_for(path, chosen, ended=alerts_done)
    for follower in (alerts, *mirrors):
        threading.Thread(target=follower.run, name=follower.name, daemon=True).start()
    _watch_node(path, chosen, node_log, node="", trainer_pid=trainer[0], ended=ended)
    threading.Thread(target=_sync_forever, args=(log_dir(path), ended), daemon=True).start()
    _wait_for_trainer(trainer, ended)
    _hurry()
    alerts.done.wait(ALERTS_S)
    alerts_done.set()  # now the mirrors can see the last alert too
    _wait_for((alerts, *mirrors), run_dir)
    os._exit(0)  # a hanging mirror's thread, or its library's, would keep the interpreter alive


def sample(*, run_dir: str, settings: str, node: str, trainer: tuple[int, float], messages_fd: int) -> None:
    """Samples a node on which rank 0 is not, until its process there is gone or said `close`."""
    path, ended = Path(run_dir), threading.Event()
    _settle_in(path, messages_fd)
    chosen = MirrorSettings.from_json(settings)
    _watch_node(path, chosen, NodeLog(path), node=node, trainer_pid=trainer[0], ended=ended)
    _wait_for_trainer(trainer, ended)
    os._exit(0)  # a thread still reads the standard input


def complete(*, run_dir: str, settings: str, rebuild: bool, timeout_s: float, messages_fd: int) -> None:
    """Brings the mirrors up to the end of a log that has ended, and ends.

    Prints for each mirror null, or what keeps it from being complete after `timeout_s`; as JSON.
    """
    path, outcome_fd = Path(run_dir), os.dup(1)
    _settle_in(path, messages_fd)
    ended = threading.Event()
    ended.set()
    followers = _followers_for(path, MirrorSettings.from_json(settings), ended=ended)
    for follower in followers:
        if rebuild:
            follower.forget()
        threading.Thread(target=follower.run, name=follower.name, daemon=True).start()
    deadline = time.monotonic() + timeout_s
    troubles = {follower.name: _trouble(follower, deadline, timeout_s) for follower in followers}
    if not all(follower.done.is_set() for follower in followers):
        faulthandler.dump_traceback()  # into side.log: where it hangs
        for child in psutil.Process().children():
            child.kill()
    os.write(outcome_fd, orjson.dumps(troubles))
    os._exit(0)


def _trouble(follower: MirrorFollower, deadline: float, timeout_s: float) -> str | None:
    follower.done.wait(max(0.0, deadline - time.monotonic()))
    if follower.done.is_set() or follower.trouble is not None:
        return follower.trouble
    return f"after {timeout_s:.0f} s " + ("it hangs" if follower.has_turn else "another process keeps it")


def _wait_for_trainer(trainer: tuple[int, float], ended: threading.Event) -> None:
    threading.Thread(target=_wait_for_close, args=(ended,), daemon=True).start()
    while not ended.wait(WATCH_S):
        if not lives(*trainer):
            ended.set()


def _hurry() -> None:
    """There is no trainer any more to give way to, and somebody may be waiting for the mirrors."""
    stop_yielding()
    for child in psutil.Process().children():
        pass_on_to(child.pid)


def _wait_for(followers: Sequence[MirrorFollower], run_dir: str) -> None:
    ended_at = time.monotonic()
    for follower in followers:
        while not follower.done.wait(WATCH_S):
            if time.monotonic() - max(ended_at, follower.moved_at) > STUCK_S:
                logger.warning("%s is incomplete; `harness sync %s` completes it", follower.name, run_dir)
                break


def _followers_for(
    run_dir: Path, settings: MirrorSettings, *, ended: threading.Event
) -> list[MirrorFollower]:
    """One follower for each mirror that the settings ask for."""
    run = MirroredRun(run_dir, settings)

    def follower(name: str) -> MirrorFollower:
        # Loaded in the mirror's own thread: a library that cannot be imported is tried again too.
        return MirrorFollower(run_dir, name, lambda state: load(name)(run, state), ended=ended)

    return [follower(name) for name in mirrors_of(settings)]


def _alerts_follower(
    run_dir: Path, settings: MirrorSettings, node_log: NodeLog, *, ended: threading.Event
) -> MirrorFollower:
    def open_alerts(state: Mapping[str, Any]) -> Mirror:
        return AlertMirror(settings.alerts, node_log=node_log, webhook=settings.webhook, run=str(run_dir))

    return MirrorFollower(run_dir, "alerts", open_alerts, ended=ended, poll_s=ALERTS_POLL_S)


def _watch_node(
    run_dir: Path,
    settings: MirrorSettings,
    node_log: NodeLog,
    *,
    node: str,
    trainer_pid: int,
    ended: threading.Event,
) -> None:
    """Samples this node; `node` stands in the names of its samples, empty on that of rank 0."""
    if settings.system_every_s > 0:
        sampler = Sampler(run_dir, pid=trainer_pid)
        keywords = {"node": node, "every_s": settings.system_every_s, "ended": ended}
        threading.Thread(
            target=sample_forever, args=(sampler, node_log), kwargs=keywords, daemon=True
        ).start()


def _sync_forever(folder: Path, ended: threading.Event) -> None:
    """Forces the log onto the disk now and then, on the trainer's behalf."""
    while not ended.wait(SYNC_EVERY_S):
        for path in segments(folder)[-1:]:
            with contextlib.suppress(OSError), path.open("rb") as file:
                os.fsync(file.fileno())


def _settle_in(run_dir: Path, messages_fd: int) -> None:
    """Leaves the trainer's terminal alone, and sends messages for people back to it."""
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
    os.set_inheritable(messages_fd, False)
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
