"""The dashboard's server: data for the page's charts, the page itself, and the access check before both."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode

import orjson
import uvicorn
from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.staticfiles import StaticFiles
from starlette.middleware.gzip import GZipMiddleware

from harness.dashboard import programs
from harness.dashboard.access import Access, Gate, is_loopback
from harness.dashboard.bundle import ASSETS
from harness.dashboard.comparison import compare_view
from harness.dashboard.run_index import RunIndex
from harness.dashboard.stories import read_story
from harness.dashboard.tensorboard import TensorBoard
from harness.dashboard.views import Axis, curves_view, layers_view, run_view, settings_view
from harness.errors import ConfigError, HarnessError
from harness.runlog.digest import Digest
from harness.runlog.names import page_names

__all__ = ["application", "serve"]

logger = logging.getLogger(__name__)


MAX_NAMES = 2000
MAX_COMPARED = 12


class _CurveQuery:
    """The query parameters that say which curves are wanted."""

    def __init__(
        self,
        name: Annotated[list[str], Query()] = [],  # noqa: B006  (FastAPI copies it)
        axis: Axis = "step",
        first: int | None = None,
        last: int | None = None,
        points: Annotated[int, Query(ge=10, le=5000)] = 800,
    ) -> None:
        self.within = None if first is None or last is None else (min(first, last), max(first, last))
        self._names, self._axis, self._points = name[:MAX_NAMES], axis, points

    def curves(self, digest: Digest) -> dict[str, Any]:
        return curves_view(digest, self._names, axis=self._axis, within=self.within, max_points=self._points)


CurveQuery = Annotated[_CurveQuery, Depends()]


def application(run_index: RunIndex, access: Access, tensorboard: TensorBoard) -> Gate:
    """The whole application behind its access check. Loads Gradio."""
    from harness.dashboard.page import mount_page  # heavy, and not needed to say what is wrong with options

    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    if not is_loopback(access.host):  # on this machine it would only cost time
        app.add_middleware(GZipMiddleware, minimum_size=2000, compresslevel=1)
    app.add_exception_handler(HarnessError, _error_response)  # type: ignore[arg-type]
    _add_data(app, run_index)
    app.add_api_route("/tensorboard/{path:path}", tensorboard.forward, methods=["GET", "POST"])
    app.mount("/own", StaticFiles(directory=ASSETS), name="assets")
    return Gate(mount_page(app, run_index, access, tensorboard), access)


def serve(runs_dir: Path, access: Access, *, started: Callable[[str], None] = print) -> None:
    """Serves until Ctrl-C.

    Args:
        runs_dir: Folder of runs.
        access: Where to listen, and for whom.
        started: Called with the address once it can be opened.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    listener = _listen(access)
    access = dataclasses.replace(access, port=listener.getsockname()[1])
    run_index = RunIndex(runs_dir)
    tensorboard = TensorBoard()
    try:
        app = application(run_index, access, tensorboard)
        run_index.start()
        settings = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)
        started(address(access))
        with contextlib.suppress(KeyboardInterrupt):  # raised once more when everything has ended
            uvicorn.Server(settings).run(sockets=[listener])
    finally:
        tensorboard.stop()
        run_index.close()
        listener.close()


def address(access: Access) -> str:
    """What to open in a browser, the token included."""
    host = f"[{access.host}]" if ":" in access.host else access.host
    return f"http://{host}:{access.port}/" + (
        f"?{urlencode({'token': access.token})}" if access.token else ""
    )


def _listen(access: Access) -> socket.socket:
    family = socket.AF_INET6 if ":" in access.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((access.host, access.port))
        listener.listen(128)  # the address may be opened at once
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {access.host}:{access.port}: {error.strerror}",
            rule="the address has to be this machine's and the port free",
            remedy="choose another --port; 0 picks a free one",
        ) from error
    return listener


def _add_data(app: FastAPI, run_index: RunIndex) -> None:
    """The addresses under /api. Each answers from the log alone and changes nothing."""

    @app.get("/api/runs")
    def runs() -> Response:
        return _json(
            {
                "runs": run_index.rows(),
                "now": time.time(),
                "folder": str(run_index.root),
                "reading": run_index.num_unread(),
            }
        )

    @app.get("/api/names")
    def names() -> Response:
        """What metrics and events are called, and what is allowed, for the page's scripts."""
        return _json({**page_names(), "limit": {"COMPARED": MAX_COMPARED}})

    @app.get("/api/run")
    def run(run: str, query: CurveQuery, statistic: str | None = None, seen: str = "") -> Response:
        """All that the page shows of a run; next to nothing if the page has `seen` this version of it."""
        with run_index.reading(run) as digest:
            version = _version(digest)
            if version == seen:
                return _json({"version": version, "unchanged": True})
            layers = layers_view(digest, statistic, within=query.within) if statistic else None
            view = {**run_view(digest), "curves": query.curves(digest), "layers": layers}
            return _json({"version": version, **view})

    @app.get("/api/settings")
    def settings(run: str) -> Response:
        with run_index.reading(run) as digest:
            return _json(settings_view(digest))

    @app.get("/api/story")
    def story(run: str, step: Annotated[int, Query(ge=0, lt=10**18)]) -> Response:
        """What a replay has found of a step."""
        directory = run_index.directory(run)
        return _json({"story": read_story(directory, step, within=run_index.root)})

    @app.get("/api/curves")
    def curves(run: str, query: CurveQuery, seen: str = "") -> Response:
        """Curves alone, where runs are compared; next to nothing if the page has `seen` this version."""
        with run_index.reading(run) as digest:
            version = _version(digest)
            if version == seen:
                return _json({"version": version, "unchanged": True})
            return _json({"version": version, **query.curves(digest)})

    @app.get("/api/compare")
    def compare(run: Annotated[list[str], Query(min_length=2, max_length=MAX_COMPARED)]) -> Response:
        return _json(compare_view(run_index, run))

    @app.get("/api/output")
    def output(run: str, offset: Annotated[int, Query(ge=0)] = 0) -> Response:
        text, end = programs.output(run_index.root, run, offset)
        return _json({"text": text, "offset": end})


def _version(digest: Digest) -> str:
    """Another one whenever a page that shows the run is out of date."""
    return f"{digest.version()}/{digest.read_frac:.4f}/{digest.state()}"


def _json(answer: Any) -> Response:
    content = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)
    return Response(content, media_type="application/json", headers={"cache-control": "no-store"})


def _error_response(request: Request, error: HarnessError) -> Response:
    return Response(orjson.dumps({"error": str(error)}), status_code=404, media_type="application/json")
