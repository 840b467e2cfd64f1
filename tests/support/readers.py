"""Everything that shows a run to somebody, asked one after another; how long each takes, and what it says."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI
from starlette.testclient import TestClient

from harness.cli.main import main
from harness.dashboard import server
from harness.dashboard.indexer import Indexer
from harness.dashboard.run_index import RunIndex
from harness.errors import HarnessError
from harness.runlog.segments import Follower, node_folders
from harness.tracking.mirror import MirroredRun
from harness.tracking.settings import MirrorSettings
from harness.tracking.tensorboard import TensorBoardMirror
from tests.support.damage import INCIDENT_STEP

__all__ = ["Answer", "Question", "Readers"]

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """What a question was answered with."""

    seconds: float
    """Of this process's time."""
    status: int
    """Of HTTP, or a command's exit code."""
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """Something to ask of a run."""

    name: str
    ask: Callable[[], Answer]


class Readers:
    """The commands and the dashboard's addresses on one folder of runs.

    Args:
        root: The folder of runs.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        app = FastAPI()
        app.add_exception_handler(HarnessError, server._error_response)  # type: ignore[arg-type]
        self.run_index = RunIndex(root, search_every_s=0.0)  # runs are asked for as soon as they are made
        server._add_data(app, self.run_index)
        self._client = TestClient(app)

    def table(self) -> dict[str, dict[str, Any]]:
        """The dashboard's rows by run; of one that could not be read at first, that. /api/runs too."""
        rows: dict[str, dict[str, Any]] = {}

        def tell(answer: dict[str, Any]) -> None:
            answer = json.loads(json.dumps(answer, default=str).encode())  # as it goes through the pipe
            if "row" in answer and rows.get(answer["run"], {}).get("state") != "unreadable":
                rows[answer["run"]] = answer["row"]

        indexer = Indexer(self.root, self.root / ".dashboard" / "digests", tell)
        indexer.refresh()
        while indexer.has_unread:
            indexer.read_on(1.0)
        self.run_index._rows = rows
        return rows

    def questions(self, run: str, other: str, out: Path) -> list[Question]:
        """All there is to ask of a run; `other` is compared with it, `out` takes exports."""
        addresses = [
            Question(f"/api/{path} {parameters}", functools.partial(self._asked, path, parameters))
            for path, parameters in self._addresses(run, other)
        ]
        commands = [self._question(command) for command in self._commands(run, other, out)]
        mirror = Question(f"TensorBoard's mirror of {run}", functools.partial(self._mirrored, run, out))
        return [*addresses, *commands, mirror]

    def all_runs(self) -> Question:
        """The table of the command line."""
        return Question("harness runs", lambda: self._ran(["runs", str(self.root)]))

    def folder_questions(self) -> list[Question]:
        """All there is to ask of the folder; the dashboard answers with what `table` has read last."""
        paths = ("runs", "names")
        asked = [Question(f"/api/{path}", functools.partial(self._asked, path, {})) for path in paths]
        return [self.all_runs(), *asked]

    def _question(self, command: list[str]) -> Question:
        ask = functools.partial(self._ran, [*command, "--runs", str(self.root)])
        return Question("harness " + " ".join(command), ask)

    def _addresses(self, run: str, other: str) -> list[tuple[str, dict[str, Any]]]:
        names = ["train/loss", "layers/grad_norm/w", "ranks/loss/max", "system/cpu_frac"]
        sight = {"name": names, "statistic": "grad_norm"}
        return [
            ("run", {"run": run, **sight}),
            *(("run", {"run": run, **sight, "axis": axis}) for axis in ("tokens", "hours", "clock")),
            ("run", {"run": run, **sight, "first": 3, "last": 9}),
            ("curves", {"run": run, "name": names, "first": -(10**30), "last": 10**30}),
            ("settings", {"run": run}),
            ("story", {"run": run, "step": INCIDENT_STEP}),
            ("story", {"run": run, "step": 10**18 - 1}),
            ("compare", {"run": [other, run]}),
            ("output", {"run": run}),
            ("output", {"run": run, "offset": 10**18}),
        ]

    def _commands(self, run: str, other: str, out: Path) -> list[list[str]]:
        return [
            ["show", run],
            ["show", run, "--incident", str(INCIDENT_STEP)],
            ["watch", run, "--once"],
            ["compare", run, other],
            ["export", run, "--format", "csv", "-o", str(out / "metrics.csv")],
            ["export", run, "--format", "json", "-o", str(out / "metrics.json")],
            ["report", run, "-o", str(out / "report.html")],
            ["verify", run],
        ]

    def _mirrored(self, run: str, out: Path) -> Answer:
        """What `harness sync` does in a process of its own."""
        seconds, _ = _timed(lambda: _mirror(self.root / run, out / "tensorboard"))
        return Answer(seconds, 0, "")

    def _asked(self, path: str, parameters: dict[str, Any]) -> Answer:
        seconds, answer = _timed(lambda: self._client.get(f"/api/{path}", params=parameters))
        return Answer(seconds, answer.status_code, answer.text)

    def _ran(self, command: list[str]) -> Answer:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            seconds, status = _timed(lambda: main(command))
        return Answer(seconds, status, said.getvalue())


def _mirror(run_dir: Path, folder: Path) -> None:
    mirror = TensorBoardMirror(MirroredRun(run_dir, MirrorSettings(tensorboard_dir=str(folder))), {})
    for place in node_folders(run_dir / "log"):
        follower = Follower(run_dir / "log" / place)
        while records := follower.read():
            for record in records:
                mirror.take(record)
    mirror.commit()
    shutil.rmtree(folder)


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    began = time.process_time()
    result = work()
    return time.process_time() - began, result
