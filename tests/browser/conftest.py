"""A real dashboard and a real browser: Debian's Chromium without a window, driven by Playwright.

A dashboard takes ten seconds to start, so all tests share one, over one folder of runs: a test gives its runs
names of its own. Two small runs that have been trained to their end are shared too.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the dashboard needs `pip install 'stability-harness[dashboard]'`")
pytest.importorskip("playwright.sync_api", reason="pip install playwright")

from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from harness.dashboard import programs
from harness.errors import TrackingError
from tests.support.runs import PROGRAM, ROOT, start, tiny, wait_for

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
START_S = 90.0

expect.set_options(timeout=20_000)


class Dashboard:
    """`harness dashboard` as a process of its own. It starts while the test goes on.

    Args:
        place: Its working folder, with the folder of runs in it.
        arguments: Further options.
        environment: Further variables.
    """

    def __init__(self, place: Path, *arguments: str, **environment: str) -> None:
        program = "from harness.cli.main import main; raise SystemExit(main())"
        self._printed = place / f"dashboard{'-'.join(['', *arguments])}.log".replace("/", "_")
        with self._printed.open("wb") as printed:
            self._process = subprocess.Popen(
                [sys.executable, "-c", program, "dashboard", "--runs", "runs", "--port", "0", *arguments],
                cwd=place,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
                stdout=printed,
                stderr=subprocess.STDOUT,
            )

    @property
    def address(self) -> str:
        """What it has printed for a browser; of one that listens to all addresses, this machine's own."""
        wait_for(lambda: "http://" in self._said() or not self.is_running, timeout_s=START_S, what="a start")
        found = re.search(r"http://\S+", self._said())
        assert found, self._said()
        return found[0].replace("0.0.0.0", "127.0.0.1")

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(timeout=30)

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def _said(self) -> str:
        return self._printed.read_text(errors="replace")


class Place:
    """The working folder of the dashboard, with its runs and their data."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs = path / "runs"
        self.runs.mkdir()
        self._settings = tiny(path)

    def arguments(self, name: str, *more: str) -> list[str]:
        """The command line of a run of a second or two; what comes later wins."""
        return [*self._settings, f"--name={name}", *more]

    def end_programs(self) -> None:
        """Kills what was started from the page and still runs."""
        for program in programs.programs(self.runs):
            with contextlib.suppress(TrackingError):
                programs.kill(program.directory)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    one = Place(tmp_path_factory.mktemp("place"))
    yield one
    one.end_programs()


@pytest.fixture(scope="session")
def dashboard(place: Place) -> Iterator[Dashboard]:
    one = Dashboard(place.path)
    yield one
    one.close()


@pytest.fixture(scope="session")
def trained(place: Place, dashboard: Dashboard) -> tuple[str, str]:
    """Two runs of twelve steps that differ in the learning rate; trained while the dashboard starts."""
    settings = {
        "trained-low": ("--optim.lr=0.001", "--guard.per_parameter_every=2", "--tracking.tensorboard=true"),
        "trained-high": ("--optim.lr=0.01",),
    }
    programs = [
        start([sys.executable, PROGRAM, *place.arguments(name, *more)]) for name, more in settings.items()
    ]
    for program in programs:
        try:
            said, _ = program.communicate(timeout=90)
        finally:
            program.kill()
        assert program.returncode == 0, said
    low, high = settings
    return low, high


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    with sync_playwright() as driver:
        # Without a sandbox, since tests may run as root in a container.
        one = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield one
        one.close()


@pytest.fixture(scope="session")
def context(browser: Browser) -> Iterator[BrowserContext]:
    """What the pages share, as those of one person do: scripts that have been fetched once."""
    one = browser.new_context(viewport={"width": 1440, "height": 1000})
    yield one
    one.close()


@pytest.fixture
def page(context: BrowserContext) -> Iterator[Page]:
    """A page that fails the test when anything goes wrong in it, or anything is asked of another host."""
    with watched_page(context) as one:
        yield one


@contextlib.contextmanager
def watched_page(context: BrowserContext) -> Iterator[Page]:
    """A page of a context, watched as `page` is."""
    troubles: list[str] = []
    one = context.new_page()
    one.set_default_timeout(20_000)
    one.on("pageerror", lambda error: troubles.append(str(error)))
    one.on("request", lambda request: _note_foreign(request.url, troubles))
    yield one
    one.close()
    assert troubles == []


def _note_foreign(url: str, troubles: list[str]) -> None:
    if not url.startswith(("http://127.0.0.1:", "ws://127.0.0.1:", "file:", "data:", "blob:", "about:")):
        troubles.append(f"asked for {url}")
