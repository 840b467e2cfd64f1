"""Everything that shows a run to somebody, asked one after another; how long each takes, and what it says."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI
from starlette.testclient import TestClient

from harness.cli.main import main
from harness.dashboard import server
from harness.dashboard.catalogue import Catalogue
from harness.dashboard.surveyor import Surveyor
from harness.errors import HarnessError

__all__ = ["Answer", "Readers"]

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """What one question was answered with."""

    question: str
    seconds: float
    """Of this process's time."""
    status: int
    """Of HTTP, or a command's exit code."""
    text: str


class Readers:
    """The commands and the dashboard's addresses on one folder of runs.

    Args:
        root: The folder of runs.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        app = FastAPI()
        app.add_exception_handler(HarnessError, server._say_what_is_wrong)  # type: ignore[arg-type]
        self.catalogue = Catalogue(root)
        server._add_data(app, self.catalogue)
        self._client = TestClient(app)

    def table(self) -> dict[str, dict[str, Any]]:
        """The dashboard's rows by run."""
        rows: dict[str, dict[str, Any]] = {}

        def tell(answer: dict[str, Any]) -> None:
            answer = json.loads(json.dumps(answer, default=str).encode())  # as it goes through the pipe
            if "glance" in answer:
                rows[answer["run"]] = answer["glance"]

        surveyor = Surveyor(self.root, self.root / ".dashboard" / "digests", tell)
        surveyor.look()
        while surveyor.has_unread:
            surveyor.read_on(1.0)
        return rows

    def questions(self, run: str, other: str, out: Path, *, report: bool = False) -> Iterator[Answer]:
        """All there is to ask of a run; `other` is compared with it.

        Args:
            out: A folder for what is exported.
            report: Draw the report too, which takes as long as matplotlib takes.
        """
        for address in self._addresses(run, other):
            yield self._asked(address)
        for command in self._commands(run, other, out):
            yield self._ran(command)
        if report:
            yield self._ran(["report", run, "-o", str(out / "report.html")])

    def _addresses(self, run: str, other: str) -> list[tuple[str, dict[str, Any]]]:
        names = ["train/loss", "layers/grad_norm/w", "ranks/loss/max", "system/cpu_frac"]
        sight = {"name": names, "statistic": "grad_norm"}
        return [
            ("run", {"run": run, **sight}),
            *(("run", {"run": run, **sight, "axis": axis}) for axis in ("tokens", "hours", "clock")),
            ("run", {"run": run, **sight, "first": 3, "last": 9}),
            ("curves", {"run": run, "name": names, "first": -(10**30), "last": 10**30}),
            ("compare", {"run": [other, run]}),
            ("output", {"run": run}),
            ("output", {"run": run, "offset": 10**18}),
        ]

    def _commands(self, run: str, other: str, out: Path) -> list[list[str]]:
        return [
            ["show", run],
            ["watch", run, "--once"],
            ["compare", run, other],
            ["export", run, "--format", "csv", "-o", str(out / "metrics.csv")],
            ["export", run, "--format", "json", "-o", str(out / "metrics.json")],
            ["verify", run],
        ]

    def _asked(self, address: tuple[str, dict[str, Any]]) -> Answer:
        path, parameters = address
        seconds, answer = _timed(lambda: self._client.get(f"/api/{path}", params=parameters))
        return Answer(f"/api/{path} {parameters}", seconds, answer.status_code, answer.text)

    def _ran(self, command: list[str]) -> Answer:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            seconds, status = _timed(lambda: main([*command, "--runs", str(self.root)]))
        return Answer("harness " + " ".join(command), seconds, status, said.getvalue())


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    began = time.process_time()
    result = work()
    return time.process_time() - began, result
