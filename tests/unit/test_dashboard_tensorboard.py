"""The dashboard's TensorBoard: whom it answers, what it reads, which runs it shows, what it leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

pytest.importorskip("fastapi", reason="the dashboard needs `pip install 'stability-harness[dashboard]'`")

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route
from starlette.testclient import TestClient
from torch.utils.tensorboard import SummaryWriter

from harness.dashboard.tensorboard import TensorBoard
from tests.support.runs import ROOT, wait_for

NAMES = ["a/b", "a", ".", "a%2Fb", "..a", "x" * 150 + "/" + "y" * 150]
"""One that lies in another, the folder of runs itself, and names that are no file names."""
SECRET = "secret-of-the-dashboards-user"


def write_run(run: Path, value: float) -> None:
    with SummaryWriter(str(run / "tensorboard")) as writer:
        writer.add_scalar("loss", value, 0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs by name; `a` has a projector configuration that asks for a file of the user."""
    root = tmp_path_factory.mktemp("runs")
    for value, name in enumerate(NAMES):
        write_run(root / name, value)
    (root.parent / "secret.tsv").write_text(SECRET)
    (root / "a/tensorboard/projector_config.pbtxt").write_text(
        f'embeddings {{ tensor_name: "t" metadata_path: "{root.parent}/secret.tsv" }}\n'
    )
    return {name: root / name for name in NAMES}


@pytest.fixture(scope="module")
def tensorboard(runs: dict[str, Path]) -> Iterator[TensorBoard]:
    one = TensorBoard()
    with contextlib.ExitStack() as at_end:
        at_end.callback(one.stop)
        one.show(runs)
        yield one


@pytest.fixture(scope="module")
def browser(tensorboard: TensorBoard) -> Iterator[TestClient]:
    routes = [Route("/tensorboard/{path:path}", tensorboard.forward, methods=["GET", "POST"])]
    with TestClient(Starlette(routes=routes), base_url="http://localhost") as client:
        yield client


def test_it_listens_on_no_port(tensorboard: TensorBoard) -> None:
    assert tensorboard._process is not None
    server = psutil.Process(tensorboard._process.pid)
    processes = [server, *server.children(recursive=True)]
    assert [one for process in processes for one in process.net_connections("inet")] == []


def test_it_shows_every_run_whatever_its_name(tensorboard: TensorBoard, browser: TestClient) -> None:
    def shown() -> dict[str, dict[str, object]]:
        return browser.get("/tensorboard/data/plugin/scalars/tags").json()

    wait_for(lambda: len(shown()) == len(NAMES), timeout_s=20, what="all runs")
    values = [
        browser.get("/tensorboard/data/plugin/scalars/scalars", params={"run": run, "tag": "loss"}).json()
        for run in shown()
    ]
    assert sorted(points[0][2] for points in values) == list(range(len(NAMES)))
    assert {"a", "a%2Fb", "a%252Fb", "%2E"} < set(shown())
    assert set(tensorboard.runs) == set(NAMES)


def test_nothing_is_written_into_a_run(tensorboard: TensorBoard, runs: dict[str, Path]) -> None:
    assert not [path for run in runs.values() for path in run.rglob("*") if path.is_symlink()]


def test_no_plugin_reads_files_that_a_run_names(browser: TestClient) -> None:
    assert "projector" not in browser.get("/tensorboard/data/plugins_listing").json()
    for route in ("metadata", "tensor", "sprite_image", "bookmarks", "info"):
        answer = browser.get(f"/tensorboard/data/plugin/projector/{route}?run=a&name=t&num_rows=9")
        assert answer.status_code == 404
        assert SECRET not in answer.text


def scope(method: str, path: str, query: bytes = b"") -> dict[str, object]:
    """A request that no HTTP client would send, as the server sees it."""
    asked = {"type": "http", "method": method, "path": f"/tensorboard/{path}", "path_params": {"path": path}}
    return {**asked, "query_string": query, "headers": []}


@pytest.mark.parametrize("path", ["/x", "%00", "a%3Fb", "a%23b", "data/none"])
def test_an_address_that_cannot_be_is_not_found(path: str, browser: TestClient) -> None:
    assert browser.get(f"/tensorboard/{path}").status_code == 404


@pytest.mark.parametrize(("path", "query"), [("x" * 70_000, b""), ("data/runs", b"x" * 70_000)])
def test_an_address_longer_than_a_client_sends_is_not_found(
    path: str, query: bytes, tensorboard: TensorBoard
) -> None:
    request = Request(scope("GET", path, query))
    assert asyncio.run(tensorboard.forward(request)).status_code == 404


def test_a_header_of_any_bytes_is_passed_on(browser: TestClient) -> None:
    answer = browser.get("/tensorboard/data/environment", headers={b"content-type": b"\xe9"})
    assert answer.status_code == 200


def test_a_body_without_end_is_refused(tensorboard: TensorBoard) -> None:
    async def receive() -> dict[str, object]:
        received.append(len(received))
        assert len(received) < 1000, "a gigabyte was read"
        return {"type": "http.request", "body": bytes(1 << 20), "more_body": True}

    received: list[int] = []
    request = Request(scope("POST", "data/runs"), receive)
    assert asyncio.run(tensorboard.forward(request)).status_code == 413


def test_a_server_that_hangs_is_told_apart_from_none(
    tensorboard: TensorBoard, browser: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tensorboard._process is not None
    monkeypatch.setattr(tensorboard._client, "timeout", 0.2)
    tensorboard._process.send_signal(signal.SIGSTOP)
    try:
        answer = browser.get("/tensorboard/data/runs")
    finally:
        tensorboard._process.send_signal(signal.SIGCONT)
    assert (answer.status_code, "not answer" in answer.text) == (504, True)


def test_it_is_started_again_after_a_stop_and_leaves_nothing(
    runs: dict[str, Path], tensorboard: TensorBoard, browser: TestClient
) -> None:
    folder = tensorboard._folder
    tensorboard.stop()
    assert (tensorboard.runs, folder.exists()) == ((), False)
    assert browser.get("/tensorboard/data/runs").status_code == 503
    tensorboard.show({name: runs[name] for name in (".", "a")})
    assert set(tensorboard.runs) == {".", "a"}
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_dashboard_that_is_killed_leaves_nothing(runs: dict[str, Path]) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from harness.dashboard.tensorboard import TensorBoard\n"
        "one = TensorBoard(); one.show({'.': Path(sys.argv[1])}); print(one._folder, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", script, str(runs["."])]
    ended = subprocess.run(command, cwd=ROOT, timeout=60, check=False, stdout=subprocess.PIPE, text=True)
    assert ended.returncode == -signal.SIGKILL
    folder = Path(ended.stdout.strip())
    assert folder.name.startswith("harness-tensorboard-")
    wait_for(lambda: not folder.exists(), timeout_s=10, what="the end of what TensorBoard left behind")
    assert (runs["."] / "tensorboard").is_dir()
