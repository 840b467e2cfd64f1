"""TensorBoard for chosen runs: one process, reached through the dashboard, and so by those whom it lets in.

It listens on a Unix socket in a folder that only this user can enter. Its log directory is a folder of links
to the runs' own `tensorboard` folders, which it searches again every few seconds.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import httpx
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from harness.dashboard.tensorboard_server import logdir_and_socket
from harness.env import program_environment
from harness.errors import ConfigError, LaunchError, TrackingError
from harness.helper import start_helper
from harness.runlog.paths import tensorboard_dir

__all__ = ["TensorBoard"]

START_S = 60.0
STOP_S = 5.0
ANSWER_S = 60.0
MAX_BODY_BYTES = 16 << 20
"""Of a request; TensorBoard's own page asks with lists of runs and tags."""
MAX_NAME_BYTES = 255
"""Of a file, on all usual file systems."""
_PASSED_ON = ("content-type", "cache-control", "expires", "location", "content-security-policy")
"""Headers of an answer that reach the browser."""


class TensorBoard:
    """The dashboard's TensorBoard. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._folder = Path(tempfile.gettempdir(), f"harness-tensorboard-{secrets.token_hex(8)}")
        """Is there while the process is; made before that, and removed by it when the dashboard dies."""
        self._logdir, self._socket = logdir_and_socket(self._folder)
        self._output = self._folder / "output.log"
        self._runs: list[str] = []
        self._process: subprocess.Popen[bytes] | None = None
        transport = httpx.AsyncHTTPTransport(uds=str(self._socket))
        self._client = httpx.AsyncClient(transport=transport, base_url="http://tensorboard", timeout=ANSWER_S)

    @property
    def runs(self) -> tuple[str, ...]:
        """Names of the runs that it shows; none if it does not run."""
        return tuple(self._runs) if self._is_running() else ()

    def show(self, runs: Mapping[str, Path]) -> None:
        """Shows these runs too; starts the process if it does not run, and waits until it answers.

        Args:
            runs: Run directories by their path below the folder of runs.

        Raises:
            TrackingError: none of them has a TensorBoard folder, or one of these holds a link.
            LaunchError: it does not answer within a minute.
        """
        _check(runs)
        with self._lock:
            if not self._is_running():
                self._stop()  # what is left of one that ended by itself
                self._make_folder()
            for name in runs.keys() - set(self._runs):
                (self._logdir / _link_name(name)).symlink_to(tensorboard_dir(runs[name]))
                self._runs.append(name)
            if not self._is_running():
                self._start()

    def stop(self) -> None:
        """Ends the process, if there is one, and removes its folder. Idempotent."""
        with self._lock:
            self._stop()

    async def forward(self, request: Request) -> Response:
        """Asks TensorBoard and passes its answer on piece by piece.

        503 if it does not run, 504 if it does not answer in time, 413 for a body that is too large, 404 for
        what can be no address.
        """
        try:
            url = httpx.URL(path="/" + request.path_params["path"], query=request.url.query.encode())
            body = await _body(request)
            headers = [
                (b"accept-encoding", b"identity"),
                (b"content-type", request.headers.get("content-type", "").encode("latin-1")),
            ]
            asked = self._client.build_request(request.method, url, content=body, headers=headers)
            return _PassedOn(await self._client.send(asked, stream=True))
        except httpx.InvalidURL:
            return PlainTextResponse("there is no such page", 404)
        except _TooLargeError:
            return PlainTextResponse(f"a request may have {MAX_BODY_BYTES} bytes", 413)
        except httpx.TimeoutException:
            return PlainTextResponse(f"TensorBoard did not answer within {ANSWER_S:g} s", 504)
        except httpx.TransportError:
            return PlainTextResponse("TensorBoard is not running; start it on the dashboard's page", 503)

    def _is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _make_folder(self) -> None:
        try:
            self._folder.mkdir(mode=0o700)
            self._logdir.mkdir()
        except OSError as error:
            raise LaunchError(
                f"TensorBoard cannot be started: {self._folder}: {error.strerror}",
                rule="its socket lies in a folder of its own",
                remedy="set TMPDIR to a folder that can be written",
            ) from error

    def _start(self) -> None:
        try:
            with self._output.open("wb") as output:
                self._process = start_helper(
                    "harness.dashboard.tensorboard_server",
                    [self._folder],
                    stdin=subprocess.PIPE,
                    stdout=output.fileno(),
                    stderr=output,
                    environment=program_environment(),
                )
        except OSError as error:
            raise LaunchError(f"TensorBoard cannot be started: {error.strerror or error}") from error
        deadline = time.monotonic() + START_S
        while not self._socket.exists():
            if time.monotonic() > deadline or not self._is_running():
                self._stop()
                printed = self._output.read_text(errors="replace").strip().splitlines()
                raise LaunchError(
                    f"TensorBoard does not answer: {printed[-1][:300] if printed else 'it printed nothing'}",
                    rule=f"it has {START_S:g} s to begin",
                    remedy="try `tensorboard --logdir runs` in a terminal",
                )
            time.sleep(0.05)

    def _stop(self) -> None:
        process, self._process = self._process, None
        self._runs = []
        if process is not None and process.stdin is not None:
            process.stdin.close()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


class _TooLargeError(Exception):
    """The body of a request has more than `MAX_BODY_BYTES`."""


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise _TooLargeError
    return bytes(body)


class _PassedOn(StreamingResponse):
    """TensorBoard's answer, piece by piece; lets go of it also where the browser leaves before its end."""

    def __init__(self, answer: httpx.Response) -> None:
        headers = {name: answer.headers[name] for name in _PASSED_ON if name in answer.headers}
        super().__init__(answer.aiter_raw(), answer.status_code, headers)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._answer.aclose()


def _link_name(run: str) -> str:
    """What TensorBoard calls a run. One part of a path, as runs may lie in each other: `a/b` is `a%2Fb`."""
    name = run.replace("%", "%25").replace("/", "%2F")
    if len(os.fsencode(name)) > MAX_NAME_BYTES:
        return hashlib.sha256(os.fsencode(run)).hexdigest()
    return "%2E" if name == "." else name  # the folder of runs is itself a run


def _check(runs: Mapping[str, Path]) -> None:
    if not runs:
        raise ConfigError("no run is chosen for TensorBoard", rule="it shows one or more")
    for name, directory in runs.items():
        _check_files(name, tensorboard_dir(directory))
    if not any(tensorboard_dir(directory).is_dir() for directory in runs.values()):
        raise TrackingError(
            f"{', '.join(runs)[:200]}: no folder `tensorboard` in any of them",
            rule="TensorBoard shows the runs' mirrors",
            remedy="`harness sync RUN --mirror tensorboard` makes one from a run's log",
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
