"""The runs below one folder, and the digests of those that somebody looks at.

A run is known by its path below the folder. Only paths that a search has found are ever opened, and nothing
is read through a link. The table is kept by a process of its own (`surveyor`), which also reads logs that are
too long to be waited for; digests are shared by all requests, each under a lock of its own.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import subprocess
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import orjson

from harness.dashboard.records import RECORDS
from harness.errors import TrackingError
from harness.helper import start_helper
from harness.runlog.digest import Digest
from harness.runlog.digest_cache import kept_path
from harness.runlog.preview import LONG_BYTES, open_digest
from harness.runlog.reader import is_run, unreadable
from harness.tracking.overview import run_name, run_paths

__all__ = ["Catalogue"]

logger = logging.getLogger(__name__)

HELD_BYTES = 512 << 20
"""Digests kept in memory; the others are read again."""
SEARCH_AGAIN_S = 0.5
LOOK_EVERY_S = 1.0
SAMPLE_EVERY_S = 10.0
CLOSE_S = 5.0


class Catalogue:
    """Finds runs and reads them. Safe to use from many threads.

    Args:
        runs_dir: The folder; it need not exist yet.
        search_again_s: A search of the folder answers for so long.
    """

    def __init__(self, runs_dir: str | Path, *, search_again_s: float = SEARCH_AGAIN_S) -> None:
        self.root = Path(runs_dir).resolve()
        self._search_again_s = search_again_s
        self._lock = threading.Lock()
        self._paths: dict[str, Path] = {}
        self._searched = -math.inf
        self._rows: dict[str, dict[str, Any]] | None = None
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._kept = self.root / RECORDS / "digests"
        self._own_folder: tempfile.TemporaryDirectory[str] | None = None
        self._surveyor: subprocess.Popen[bytes] | None = None
        self._looked = 0.0
        self._is_closed = False

    def start(self) -> None:
        """Begins to keep the table."""
        try:
            if self._kept.resolve() != self._kept:  # before anything is made on the other side of a link
                raise OSError("the folder of digests is reached through a link")
            self._kept.mkdir(parents=True, exist_ok=True)
            (self._kept / "writable").touch()
        except OSError:  # somebody else's runs: what was read is kept until the end only
            self._own_folder = tempfile.TemporaryDirectory(prefix="harness-dashboard-")
            self._kept = Path(self._own_folder.name)
        self._start_surveyor()

    def close(self) -> None:
        """Ends what `start` began."""
        self._is_closed = True
        if self._surveyor is not None:
            with contextlib.suppress(OSError):
                _pipe_to(self._surveyor).close()
            try:
                self._surveyor.wait(CLOSE_S)
            except subprocess.TimeoutExpired:
                self._surveyor.kill()
                self._surveyor.wait()
        if self._own_folder is not None:
            self._own_folder.cleanup()

    def names(self) -> list[str]:
        """The runs that there are now, by their path below the folder."""
        self._search()
        return list(self._paths)

    def directory(self, run: str) -> Path:
        """The directory of a run.

        Raises:
            TrackingError: no search has found such a run below the folder.
        """
        if run not in self._paths:
            self._search()
        path = self._paths.get(run)
        if path is None:
            raise TrackingError(
                f"there is no run {run[:200]!r} in {self.root}",
                rule="only runs below that folder are shown",
                remedy="choose one of the table",
            )
        return path

    def rows(self) -> list[dict[str, Any]]:
        """Every run in a few numbers (see `Glance`), as far as they have been read; asks for newer ones."""
        now = time.monotonic()
        with self._lock:
            is_due = now - self._looked > LOOK_EVERY_S
            self._looked = now if is_due else self._looked
            rows = [{"id": run, **row} for run, row in (self._rows or {}).items() if "state" in row]
        if is_due:
            self._order({"look": True})
        return rows

    def num_unread(self) -> int:
        """Runs whose log was found and not read to its end yet."""
        with self._lock:
            rows = self._rows
        return (
            len(self.names()) if rows is None else sum(row.get("read_frac", 0.0) < 1 for row in rows.values())
        )

    @contextlib.contextmanager
    def reading(self, run: str) -> Iterator[Digest]:
        """The run's digest, brought up to the log; nobody else uses it meanwhile.

        Of a long log that has not been read yet it is a sample, whose `read_frac` says how far the reading
        has come.

        Raises:
            TrackingError: there is no such run, or it cannot be read.
        """
        held = self._hold(run)
        with held.lock:
            try:
                self._bring_up(run, held)
            except OSError as error:
                raise unreadable(run, error) from error
            yield held.digest

    def _hold(self, run: str) -> _Held:
        path = self.directory(run)
        with self._lock:
            held = self._held.pop(run, None) or _Held(path, self.root)
            self._held[run] = held
            while (
                sum(one.digest.num_bytes for one in self._held.values()) > HELD_BYTES and len(self._held) > 1
            ):
                self._held.popitem(last=False)
        return held

    def _bring_up(self, run: str, held: _Held) -> None:
        if not is_run(held.digest.path, within=self.root):
            raise FileNotFoundError(errno.ENOENT, "it is not there any more")
        if not held.is_current():
            kept = kept_path(self._kept, run)
            held.take(open_digest(held.digest.path, kept=kept, within=self.root))
            if held.digest.is_sample:
                self._order({"want": run})
        held.digest.refresh()
        if held.digest.is_sample:
            row = (self._rows or {}).get(run, {})
            held.digest.read_frac = min(0.999, row.get("read_frac", 0.0))

    def _search(self) -> None:
        if time.monotonic() - self._searched < self._search_again_s:
            return
        found = {run_name(path, self.root): path for path in run_paths(self.root, within=self.root)}
        with self._lock:
            self._paths = found
            self._searched = time.monotonic()
            for gone in set(self._held) - set(found):
                del self._held[gone]

    def _order(self, order: dict[str, Any]) -> None:
        surveyor = self._surveyor
        if surveyor is None:
            return
        try:
            _pipe_to(surveyor).write(orjson.dumps(order) + b"\n")
            _pipe_to(surveyor).flush()
        except (OSError, ValueError):
            self._replace(surveyor)

    def _replace(self, gone: subprocess.Popen[bytes]) -> None:
        with self._lock:
            if self._is_closed or self._surveyor is not gone or gone.poll() is None:
                return
            logger.warning("the table's reader ended with code %s; it is started again", gone.returncode)
            with contextlib.suppress(OSError):
                _pipe_to(gone).close()
            self._start_surveyor()

    def _start_surveyor(self) -> None:
        self._surveyor = start_helper(
            "harness.dashboard.surveyor",
            ["--runs", self.root, "--digests", self._kept],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            yields=True,
        )
        threading.Thread(target=self._hear, args=(self._surveyor,), name="table", daemon=True).start()

    def _hear(self, surveyor: subprocess.Popen[bytes]) -> None:
        assert surveyor.stdout is not None
        with surveyor.stdout as answers:
            for line in answers:
                if not line.endswith(b"\n"):  # torn: the reader was killed
                    return
                answer = orjson.loads(line)
                with self._lock:
                    if "runs" in answer:
                        known = self._rows or {}
                        self._rows = {run: known.get(run, {}) for run in answer["runs"]}
                    elif self._rows is not None and answer["run"] in self._rows:
                        self._rows[answer["run"]].update(answer.pop("glance", answer))


def _pipe_to(process: subprocess.Popen[bytes]) -> IO[bytes]:
    assert process.stdin is not None
    return process.stdin


class _Held:
    """A digest that is in use."""

    def __init__(self, path: Path, within: Path) -> None:
        self.lock = threading.Lock()
        self.digest = Digest(path, within=within)
        self._made: float | None = None

    def take(self, digest: Digest) -> None:
        """Uses this one from now on."""
        self.digest = digest
        self._made = time.monotonic()

    def is_current(self) -> bool:
        """Whether it can be brought up to the log by itself: a sample is only good for a while."""
        if self._made is None or self.digest.bytes_behind() > LONG_BYTES:
            return False
        return not self.digest.is_sample or time.monotonic() - self._made < SAMPLE_EVERY_S
