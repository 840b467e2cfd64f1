"""The side process: follows a run's log into its mirrors, outlives the trainer, and then ends by itself.

It is started by `mirrors.start_mirrors`, reads `close` from its standard input, and otherwise looks every
second whether the trainer still lives. `mirrors.complete_mirrors` starts it for a run that has ended,
`mirrors.start_sampler` on other nodes, where there are no mirrors. One thread per mirror: a mirror that hangs
holds up no other. It imports no torch.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import psutil

from harness.priority import pass_on_to, stop_yielding
from harness.runlog.nodes import NodeLog
from harness.runlog.paths import log_dir, picture_file, side_output_file
from harness.runlog.process import lives
from harness.runlog.segments import segments
from harness.tracking.alerts import AlertMirror
from harness.tracking.mirror import Mirror, MirroredRun, MirrorFollower
from harness.tracking.registry import load, mirrors_of
from harness.tracking.resources import Sampler, sample_forever
from harness.tracking.settings import MirrorSettings

__all__ = ["main"]

logger = logging.getLogger(__name__)

ALERTS_S = 5.0
"""How long mirrors wait for the last alert."""
ALERTS_POLL_S = 1.0
STUCK_S = 600.0
"""How long a mirror may stand still after the trainer's end, an upload included, before it is given up. Much
may be left to do then: beside a training that keeps all cores busy a mirror gets little of them."""
SYNC_EVERY_S = 30.0
WATCH_S = 1.0


def main(arguments: Sequence[str]) -> None:
    """The side process; see `mirrors` for what it is told."""
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=["follow", "sample", "complete"])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--settings", type=MirrorSettings.from_json, required=True)
    parser.add_argument("--messages", type=int, required=True, help="descriptor of a pipe to the trainer")
    parser.add_argument("--path", default="", help="where else a user's mirrors are found")
    parser.add_argument("--trainer", type=int, help="its process")
    parser.add_argument("--trainer-start", type=float, help="when that began, in seconds since the boot")
    parser.add_argument("--node", default="", help="with `sample`: stands in the names of the samples")
    parser.add_argument("--rebuild", action="store_true", help="with `complete`")
    parser.add_argument("--timeout", type=float, help="with `complete`: seconds for each mirror")
    options = parser.parse_args(arguments)
    sys.path += options.path.split(os.pathsep) if options.path else []
    outcome_fd = os.dup(1)
    _settle_in(options.run, options.messages)
    if options.task == "complete":
        troubles = _complete(options.run, options.settings, options.rebuild, options.timeout)
        os.write(outcome_fd, orjson.dumps(troubles))
    else:
        task = _follow if options.task == "follow" else _sample
        task(options.run, options.settings, _Trainer(options.trainer, options.trainer_start), options.node)
    os._exit(0)  # a hanging mirror's thread, or its library's, would keep the interpreter alive


class _Trainer(NamedTuple):
    """The process that this one was started for."""

    pid: int
    start_s: float
    """See `started_at`."""

    def wait(self, ended: threading.Event) -> None:
        """Waits until it is gone or said `close`; sets `ended` then."""
        threading.Thread(target=_wait_for_close, args=(ended,), daemon=True).start()
        while not ended.wait(WATCH_S):
            if not lives(self.pid, self.start_s):
                ended.set()


def _follow(path: Path, settings: MirrorSettings, trainer: _Trainer, node: str) -> None:
    """Keeps the mirrors until the trainer has ended and all are complete or stuck."""
    ended, alerts_done = threading.Event(), threading.Event()
    node_log = NodeLog(path)
    alerts = _alerts_follower(path, settings, node_log, ended=ended)
    mirrors = _followers_for(path, settings, ended=alerts_done)
    for follower in (alerts, *mirrors):
        threading.Thread(target=follower.run, name=follower.name, daemon=True).start()
    _watch_node(path, settings, node_log, node, trainer.pid, ended)
    threading.Thread(target=_sync_forever, args=(log_dir(path), ended), daemon=True).start()
    trainer.wait(ended)
    _hurry()
    alerts.done.wait(ALERTS_S)
    alerts_done.set()  # now the mirrors can see the last alert too
    if settings.picture:
        _draw_picture(path)
    _wait_for((alerts, *mirrors), path)


def _sample(path: Path, settings: MirrorSettings, trainer: _Trainer, node: str) -> None:
    """Samples a node on which rank 0 is not, until its process there has ended."""
    ended = threading.Event()
    _watch_node(path, settings, NodeLog(path), node, trainer.pid, ended)
    trainer.wait(ended)


def _complete(path: Path, settings: MirrorSettings, rebuild: bool, timeout_s: float) -> dict[str, str | None]:
    """Brings the mirrors up to the end of a log that has ended.

    Returns:
        For each mirror None, or what keeps it from being complete after `timeout_s`.
    """
    ended = threading.Event()
    ended.set()
    troubles = {name: _import_trouble(name) for name in mirrors_of(settings, live=False)}
    followers = [
        f
        for f in _followers_for(path, settings, ended=ended)
        if f.name in troubles and troubles[f.name] is None
    ]
    for follower in followers:
        if rebuild:
            follower.forget()
        threading.Thread(target=follower.run, name=follower.name, daemon=True).start()
    deadline = time.monotonic() + timeout_s
    troubles |= {follower.name: _trouble(follower, deadline, timeout_s) for follower in followers}
    if not all(follower.done.is_set() for follower in followers):
        faulthandler.dump_traceback()  # into side.log: where it hangs
        for child in psutil.Process().children():
            child.kill()
    return troubles


def _import_trouble(name: str) -> str | None:
    """What keeps a mirror from being imported: for somebody who waits for it, trying again is no help."""
    try:
        load(name)
    except (Exception, SystemExit) as error:  # noqa: BLE001  (a user's module may raise anything)
        return f"{type(error).__name__}: {error}"
    return None


def _trouble(follower: MirrorFollower, deadline: float, timeout_s: float) -> str | None:
    follower.done.wait(max(0.0, deadline - time.monotonic()))
    if follower.done.is_set() or follower.trouble is not None:
        return follower.trouble
    return f"after {timeout_s:.0f} s " + ("it hangs" if follower.has_turn else "another process keeps it")


def _draw_picture(run_dir: Path) -> None:
    """Leaves `curves.png` in the run directory: whole, or the one before."""
    from harness.tracking.plots import plot_run

    try:
        plot_run(run_dir, picture_file(run_dir))
    except Exception as error:  # noqa: BLE001  (the mirrors are worth more)
        logger.warning("%s cannot be drawn: %s: %s", picture_file(run_dir), type(error).__name__, error)


def _hurry() -> None:
    """There is no trainer any more to give way to, and somebody may be waiting for the mirrors."""
    stop_yielding()
    for child in psutil.Process().children():
        pass_on_to(child.pid)


def _wait_for(followers: Sequence[MirrorFollower], run_dir: Path) -> None:
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
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the trainer may still write its last words after these
    output = os.open(side_output_file(run_dir), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
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
