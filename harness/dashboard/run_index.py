"""The runs below one folder, and the digests of those that are being viewed.

A run's name is its path below the folder. Only paths that a search has found are ever opened, and no link is
followed. Rows of the table come from a process of its own, the `indexer`, which also reads logs that are too
long to wait for. All requests share the digests, each of which has a lock.
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
from harness.runlog.digest_cache import digest_file
from harness.runlog.preview import LONG_BYTES, open_digest
from harness.runlog.reader import is_run, unreadable
from harness.tracking.overview import run_name, run_paths

__all__ = ["RunIndex"]

logger = logging.getLogger(__name__)

MEMORY_BYTES = 512 << 20
"""Of digests; beyond that the least recently used ones are dropped, and read again when they are needed."""
SEARCH_EVERY_S = 0.5
REFRESH_EVERY_S = 1.0
PREVIEW_EVERY_S = 10.0
STOP_S = 5.0


class RunIndex:
    """Finds runs and reads them. Safe to use from many threads.

    Args:
        runs_dir: The folder; it need not exist yet.
        search_every_s: A search of the folder is not repeated before.
    """

    def __init__(self, runs_dir: str | Path, *, search_every_s: float = SEARCH_EVERY_S) -> None:
        self.root = Path(runs_dir).resolve()
        self._search_every_s = search_every_s
        self._lock = threading.Lock()
        self._paths: dict[str, Path] = {}
        self._searched = -math.inf
        self._rows: dict[str, dict[str, Any]] | None = None
        """None until the indexer has answered; a run's row is empty until its log has been looked at."""
        self._refreshed = 0.0
        self._digests: OrderedDict[str, _SharedDigest] = OrderedDict()
        self._cache = self.root / RECORDS / "digests"
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._indexer: subprocess.Popen[bytes] | None = None
        self._is_closed = False

    def start(self) -> None:
        """Starts the indexer."""
        try:
            if self._cache.resolve() != self._cache:  # before anything is made on the other side of a link
                raise OSError("the folder of digests is reached through a link")
            self._cache.mkdir(parents=True, exist_ok=True)
            (self._cache / "writable").touch()
        except OSError:  # somebody else's runs: the cache lasts as long as the dashboard
            self._temporary = tempfile.TemporaryDirectory(prefix="harness-dashboard-")
            self._cache = Path(self._temporary.name)
        self._start_indexer()

    def close(self) -> None:
        """Ends the indexer."""
        with self._lock:  # from here on nobody starts another one
            self._is_closed = True
            indexer = self._indexer
        if indexer is not None:
            with contextlib.suppress(OSError):
                _stdin(indexer).close()
            try:
                indexer.wait(STOP_S)
            except subprocess.TimeoutExpired:
                indexer.kill()
                indexer.wait()
        if self._temporary is not None:
            self._temporary.cleanup()

    def names(self) -> list[str]:
        """The runs that there are now."""
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
                remedy="choose one from the table",
            )
        return path

    def rows(self) -> list[dict[str, Any]]:
        """The `RunRow` of every run, as far as its log has been read; asks the indexer for newer ones."""
        now = time.monotonic()
        with self._lock:
            is_due = now - self._refreshed > REFRESH_EVERY_S
            self._refreshed = now if is_due else self._refreshed
            rows = [{"id": run, **row} for run, row in (self._rows or {}).items() if "state" in row]
        if is_due:
            self._send({"refresh": True})
        return rows

    def num_unread(self) -> int:
        """Runs whose log has not been read to its end yet."""
        with self._lock:
            rows = self._rows
        if rows is None:
            return len(self.names())
        return sum(row.get("read_frac", 0.0) < 1 for row in rows.values())

    @contextlib.contextmanager
    def reading(self, run: str) -> Iterator[Digest]:
        """The run's digest, brought up to the end of the log, for this thread alone.

        Of a long log that has not been read yet it is a preview, whose `read_frac` says how far the indexer
        has come.

        Raises:
            TrackingError: there is no such run, or it cannot be read.
        """
        shared = self._shared_digest(run)
        with shared.lock:
            try:
                yield self._refreshed_digest(run, shared)
            except OSError as error:
                raise unreadable(run, error) from error

    def _shared_digest(self, run: str) -> _SharedDigest:
        path = self.directory(run)
        with self._lock:
            shared = self._digests.pop(run, None) or _SharedDigest(Digest(path, within=self.root))
            self._digests[run] = shared
            while len(self._digests) > 1 and self._num_bytes() > MEMORY_BYTES:
                self._digests.popitem(last=False)
        return shared

    def _num_bytes(self) -> int:
        return sum(shared.digest.num_bytes for shared in self._digests.values())

    def _refreshed_digest(self, run: str, shared: _SharedDigest) -> Digest:
        path = shared.digest.path
        if not is_run(path, within=self.root):
            raise FileNotFoundError(errno.ENOENT, "it is not there any more")
        if not shared.can_be_refreshed():
            shared.replace(open_digest(path, cached=digest_file(self._cache, run), within=self.root))
            if shared.digest.is_preview:
                self._send({"prioritize": run})
        shared.digest.refresh()
        if shared.digest.is_preview:
            row = (self._rows or {}).get(run, {})
            shared.digest.read_frac = min(0.999, row.get("read_frac", 0.0))
        return shared.digest

    def _search(self) -> None:
        if time.monotonic() - self._searched < self._search_every_s:
            return
        found = {run_name(path, self.root): path for path in run_paths(self.root, within=self.root)}
        with self._lock:
            self._paths = found
            self._searched = time.monotonic()
            for gone in self._digests.keys() - found:
                del self._digests[gone]

    def _send(self, request: dict[str, Any]) -> None:
        """Asks the indexer; starts it again if it has died."""
        indexer = self._indexer
        if indexer is None:
            return
        try:
            _stdin(indexer).write(orjson.dumps(request) + b"\n")
            _stdin(indexer).flush()
        except (OSError, ValueError):
            with self._lock:
                if not self._is_closed and self._indexer is indexer and indexer.poll() is not None:
                    logger.warning("the indexer ended with code %s; it is restarted", indexer.returncode)
                    with contextlib.suppress(OSError):
                        _stdin(indexer).close()
                    self._start_indexer()

    def _start_indexer(self) -> None:
        self._indexer = start_helper(
            "harness.dashboard.indexer",
            ["--runs", self.root, "--cache", self._cache],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            yields=True,
        )
        threading.Thread(target=self._receive, args=(self._indexer,), name="indexer", daemon=True).start()

    def _receive(self, indexer: subprocess.Popen[bytes]) -> None:
        assert indexer.stdout is not None
        with indexer.stdout as answers:
            for line in answers:
                if not line.endswith(b"\n"):  # torn: the indexer was killed
                    return
                answer = orjson.loads(line)
                with self._lock:
                    if "runs" in answer:
                        earlier = self._rows or {}
                        self._rows = {run: earlier.get(run, {}) for run in answer["runs"]}
                    elif self._rows is not None and answer["run"] in self._rows:
                        self._rows[answer["run"]].update(answer.pop("row", answer))


def _stdin(process: subprocess.Popen[bytes]) -> IO[bytes]:
    assert process.stdin is not None
    return process.stdin


class _SharedDigest:
    """A digest, and the lock of those who read it."""

    def __init__(self, digest: Digest) -> None:
        self.lock = threading.Lock()
        self.digest = digest
        self._opened: float | None = None

    def replace(self, digest: Digest) -> None:
        """Puts this one in its place."""
        self.digest = digest
        self._opened = time.monotonic()

    def can_be_refreshed(self) -> bool:
        """Whether there is little to read on; a preview stays as it is, and is soon made anew."""
        if self._opened is None or self.digest.bytes_behind() > LONG_BYTES:
            return False
        return not self.digest.is_preview or time.monotonic() - self._opened < PREVIEW_EVERY_S
