"""The dashboard's TensorBoard: whom it answers, what it reads, which runs it shows, what it leaves behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

pytest.importorskip("fastapi", reason="the dashboard needs `pip install 'stability-harness[dashboard]'`")

from starlette.applications import Starlette
from starlette.routing import Route
from starlette.testclient import TestClient
from torch.utils.tensorboard import SummaryWriter

from harness.dashboard.tensorboard import TensorBoard
from tests.support.runs import wait_for

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
    with contextlib.closing(TensorBoard()) as one:
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


def test_it_can_be_stopped_and_shown_again(tensorboard: TensorBoard, runs: dict[str, Path]) -> None:
    tensorboard.stop()
    tensorboard.show({name: runs[name] for name in (".", "a")})
    assert set(tensorboard.runs) == {".", "a"}
