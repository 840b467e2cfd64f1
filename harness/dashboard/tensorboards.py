"""TensorBoard for chosen runs: a server for this machine alone, which ends with the dashboard.

What it shows is a folder of links to the runs' own folders, so that no name can be taken for anything else,
as it might be in `--logdir_spec`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import psutil

from harness.env import program_environment
from harness.errors import ConfigError, LaunchError, TrackingError
from harness.runlog.paths import tensorboard_dir

__all__ = ["TensorBoard", "TensorBoards"]

logger = logging.getLogger(__name__)

MOST = 8
"""Servers at the same time."""
START_S = 60.0
_HOST = "127.0.0.1"
# The dashboard holds the other end of standard input: when it dies, however that comes, the input ends.
_SERVER = """
import os, runpy, sys, threading
def end_with_the_dashboard():
    sys.stdin.buffer.read()
    os._exit(0)
threading.Thread(target=end_with_the_dashboard, daemon=True).start()
runpy.run_module("tensorboard.main", run_name="__main__", alter_sys=True)
"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TensorBoard:
    """A server that answers."""

    number: int
    """By which it is stopped."""
    url: str
    runs: tuple[str, ...]
    """Names of the runs that it shows."""
    pid: int


@dataclasses.dataclass(slots=True)
class _Server:
    runs: dict[str, Path]
    folder: Path
    process: subprocess.Popen[bytes]
    told: TensorBoard | None = None


class TensorBoards:
    """The servers of one dashboard. A context manager, safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._servers: dict[int, _Server] = {}
        self._numbers = itertools.count(1)

    def start(self, runs: Mapping[str, Path]) -> TensorBoard:
        """Starts a server and waits until it answers; runs that are being shown already get theirs.

        Args:
            runs: Run directories by the names to show, which are paths below a folder of runs.

        Raises:
            ConfigError: no runs, or a name that is no such path.
            TrackingError: none of them has a TensorBoard folder, or one of these holds a link.
            LaunchError: there are too many servers, or this one does not answer within a minute.
        """
        _check(runs)
        with self._lock:
            self._forget_ended()
            for server in self._servers.values():
                if server.runs == dict(runs) and server.told is not None:
                    return server.told
            if len(self._servers) >= MOST:
                raise LaunchError(
                    f"there are {MOST} TensorBoards", rule="that is enough", remedy="stop one of them"
                )
            number = next(self._numbers)
            server = self._servers[number] = _start(dict(runs))
        try:
            url = _wait_until_it_answers(server)
        except LaunchError:
            self.stop(number)
            raise
        server.told = TensorBoard(number=number, url=url, runs=tuple(runs), pid=server.process.pid)
        return server.told

    def list(self) -> list[TensorBoard]:
        """Those that answer, oldest first."""
        with self._lock:
            self._forget_ended()
            return [server.told for server in self._servers.values() if server.told is not None]

    def stop(self, number: int) -> None:
        """Ends a server; one that has ended already is no error."""
        with self._lock:
            server = self._servers.pop(number, None)
        if server is not None:
            _end(server)

    def close(self) -> None:
        """Ends all of them. Idempotent."""
        with self._lock:
            servers, self._servers = self._servers, {}
        for server in servers.values():
            _end(server)

    def __enter__(self) -> TensorBoards:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _forget_ended(self) -> None:
        for number, server in list(self._servers.items()):
            if server.told is not None and server.process.poll() is not None:
                logger.warning("the TensorBoard at %s has ended by itself", server.told.url)
                _end(self._servers.pop(number))


def _check(runs: Mapping[str, Path]) -> None:
    if not runs:
        raise ConfigError("no run is chosen for TensorBoard", rule="it shows one or more")
    within = {parent for name in runs for parent in Path(name).parents}
    for name in runs:
        path = Path(name)
        if path in within or "\0" in name or path.is_absolute() or ".." in path.parts:
            raise ConfigError(
                f"the run's name is {name[:200]!r}",
                rule="it is a path below a folder of runs, and no other run lies in it",
            )
    for name, directory in runs.items():
        _check_files(name, tensorboard_dir(directory))
    if not any(tensorboard_dir(directory).is_dir() for directory in runs.values()):
        raise TrackingError(
            f"{', '.join(runs)[:200]}: no folder `tensorboard` in any of them",
            rule="TensorBoard shows the runs' mirrors",
            remedy="`harness sync RUN --tensorboard` makes one from a run's log",
        )


def _check_files(name: str, folder: Path) -> None:
    """TensorBoard follows links and waits for pipes, and it answers over HTTP."""
    for path in [folder, *folder.rglob("*")]:
        if path.is_symlink() or (path.exists() and not path.is_file() and not path.is_dir()):
            raise TrackingError(
                f"{name[:200]}: {path.relative_to(folder.parent)} is a link, or no regular file",
                rule="the dashboard shows nothing from outside the folder of runs",
                remedy="put the file itself there, or start `tensorboard` in a terminal",
            )


def _start(runs: dict[str, Path]) -> _Server:
    folder = Path(tempfile.mkdtemp(prefix="harness-tensorboard-"))
    command = [sys.executable, "-P", "-c", _SERVER]
    try:
        for name, directory in runs.items():
            link = folder / "runs" / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(tensorboard_dir(directory).resolve())
        with open(folder / "output.log", "wb") as printed:
            process = subprocess.Popen(
                [*command, "--logdir", str(folder / "runs"), "--host", _HOST, "--port", "0"],
                stdin=subprocess.PIPE,
                stdout=printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=program_environment(),
            )
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise LaunchError(f"TensorBoard cannot be started: {error.strerror or error}") from error
    return _Server(runs, folder, process)


def _wait_until_it_answers(server: _Server) -> str:
    """Its address. The port is asked of the system, which has chosen it."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.process.poll() is None:
        port = _port(server.process.pid)
        if port is not None and _answers(f"http://{_HOST}:{port}/"):
            return f"http://{_HOST}:{port}/"
        time.sleep(0.05)
    said = (server.folder / "output.log").read_text(errors="replace").strip().splitlines()
    raise LaunchError(
        f"TensorBoard does not answer: {said[-1][:300] if said else 'it said nothing'}",
        rule=f"it has {START_S:g} s to begin",
        remedy="try `tensorboard --logdir runs` in a terminal",
    )


def _port(pid: int) -> int | None:
    with contextlib.suppress(psutil.Error):
        for connection in psutil.Process(pid).net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.ip == _HOST:
                return int(connection.laddr.port)
    return None


def _answers(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy knows this machine
    try:
        with opener.open(f"{url}data/environment", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _end(server: _Server) -> None:
    if server.process.stdin is not None:
        server.process.stdin.close()
    try:
        server.process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        server.process.kill()
        server.process.wait()
    shutil.rmtree(server.folder, ignore_errors=True)
