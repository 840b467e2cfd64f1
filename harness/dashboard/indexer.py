"""The indexer: reads every run's log for the dashboard's table, in a process of the lowest priority.

`run_index` starts it. It takes requests from its standard input, `{"refresh": true}` and
`{"prioritize": RUN}`, and answers on its standard output, each a line of JSON:

    {"runs": [RUN, ...]}                 the runs that a search has found, newest first
    {"run": RUN, "row": {...}}           a row of the table, at first from both ends of the log alone
    {"run": RUN, "read_frac": 0.25}      how far a long log has been read

Logs are read to their end a little at a time, between requests. Digests of long logs and the rows of runs
that have ended are cached in files; from there the dashboard gets the digests. It imports no torch.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson

from harness.atomic import write_atomically
from harness.dashboard.records import has_fields_of
from harness.files import read_file
from harness.runlog.digest import Digest
from harness.runlog.digest_cache import digest_file, load_digest, save_digest
from harness.runlog.log_follower import log_signature
from harness.runlog.paths import log_dir
from harness.runlog.preview import LONG_BYTES, preview
from harness.tracking.overview import RunRow, run_name, run_paths, run_row, unreadable_row
from harness.tracking.text import printable, spelled

__all__ = ["Indexer", "main"]

logger = logging.getLogger(__name__)

SEARCH_EVERY_S = 5.0
SLICE_S = 0.5
"""How long a long log is read before requests are looked at."""
SAVE_EVERY_S = 60.0
PREVIEW_BYTES = 16 << 10
ROWS_FILE = "rows-1.json"
"""Its number goes up when the same log makes another row."""
MAX_ROWS_BYTES = 256 << 20

Request = dict[str, Any]


def main(arguments: Sequence[str]) -> None:
    """Serves until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True, help="folder for digests of long logs and rows")
    options = parser.parse_args(arguments)
    requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()
    indexer = Indexer(options.runs, options.cache, _send)
    indexer.refresh()
    while True:
        for request in _pending(requests, wait=not indexer.has_unread):
            if request is None:
                return
            if "prioritize" in request:
                indexer.prioritize(request["prioritize"])
            else:
                indexer.refresh()
        indexer.read_on(SLICE_S)


class Indexer:
    """Finds the runs below a folder and keeps a row of each.

    Args:
        root: The folder.
        cache: Folder for digests of long logs and for rows.
        send: Takes the answers.
    """

    def __init__(self, root: Path, cache: Path, send: Callable[[dict[str, Any]], None]) -> None:
        self._root = root
        self._cache = cache
        self._send = send
        self._searched = -SEARCH_EVERY_S
        self._paths: dict[str, Path] = {}
        self._open: dict[str, Digest] = {}
        """Of runs that have not ended, and of the one that is being read."""
        self._unread: dict[str, float] = {}
        """Runs whose log is to be read to its end, the next one first; and when a digest was last cached."""
        self._rows = _cached_rows(cache / ROWS_FILE)
        """Of runs that have ended, each with the signature of its log."""
        self._unsound: dict[str, str] = {}
        """Runs of whose log nothing can be made, with its signature: they wait until it grows."""
        self._warned: set[str] = set()
        self._rows_saved = time.monotonic()
        self._has_sent_rows = False

    @property
    def has_unread(self) -> bool:
        """Whether there are logs to be read on."""
        return bool(self._unread)

    def refresh(self) -> None:
        """Looks for runs, and at those whose log has grown or whose state may change by itself."""
        has_searched = time.monotonic() - self._searched >= SEARCH_EVERY_S
        if has_searched:
            self._search()
        for run, path in self._paths.items():
            if has_searched or run not in self._rows:  # runs that have ended are looked at less often
                with self._unless_unreadable(run):
                    self._refresh_run(run, path)

    def prioritize(self, run: str) -> None:
        """Makes this run the next one to be read, since it is being viewed."""
        if run in self._unread:
            self._unread = {run: self._unread.pop(run), **self._unread}

    def read_on(self, budget_s: float) -> None:
        """Reads logs on for a while; caches the digest of a long one when it is complete or much was read."""
        deadline = time.monotonic() + budget_s
        while self._unread and (left_s := deadline - time.monotonic()) > 0:
            run, saved = next(iter(self._unread.items()))
            del self._unread[run]
            with self._unless_unreadable(run):
                if not self._read(run, self._paths[run], saved, left_s):
                    return
        if time.monotonic() - self._rows_saved > SAVE_EVERY_S or not self._unread:
            self._save_rows()

    def _read(self, run: str, path: Path, saved: float, budget_s: float) -> bool:
        """Whether the log has been read to its end within the time; else it is the next one again."""
        digest = self._digest(run, path)
        signature, size = log_signature(path, within=self._root)
        is_complete = digest.refresh(budget_s=budget_s)
        if size > LONG_BYTES and (is_complete or time.monotonic() - saved > SAVE_EVERY_S):
            save_digest(digest, digest_file(self._cache, run))
            saved = time.monotonic()
        if is_complete:
            self._update(run, digest, signature)
        else:
            self._unread = {run: saved, **self._unread}
            self._send({"run": run, "read_frac": digest.read_frac})
        return is_complete

    def _search(self) -> None:
        self._searched = time.monotonic()
        found = sorted(run_paths(self._root, within=self._root), key=_last_written, reverse=True)
        self._paths = {run_name(path, self._root): path for path in found}
        by_run: dict[str, Any]
        for by_run in (self._rows, self._open, self._unread, self._unsound):
            for gone in by_run.keys() - self._paths:
                del by_run[gone]
        self._send({"runs": list(self._paths)})
        if not self._has_sent_rows:
            self._has_sent_rows = True
            for run, (_, row) in self._rows.items():
                self._send({"run": run, "row": row})

    def _refresh_run(self, run: str, path: Path) -> None:
        signature, size = log_signature(path, within=self._root)
        is_unchanged = signature in (self._rows.get(run, ("", {}))[0], self._unsound.get(run))
        if is_unchanged or run in self._unread:
            return
        self._rows.pop(run, None)
        digest = self._open.get(run)
        if digest is None and size > PREVIEW_BYTES:
            self._unread[run] = time.monotonic()
            first = preview(path, num_places=0, tail_bytes=PREVIEW_BYTES, within=self._root)
            self._send_row(run, run_row(first))
        elif digest is not None and digest.bytes_behind() > LONG_BYTES:
            self._unread[run] = time.monotonic()
        else:
            digest = self._digest(run, path)
            digest.refresh()
            self._update(run, digest, signature)

    def _update(self, run: str, digest: Digest, signature: str) -> None:
        row = self._send_row(run, run_row(digest))
        if row["state"] not in ("running", "stale"):
            self._rows[run] = (signature, row)  # it stays like that until the log grows
            self._open.pop(run, None)

    def _send_row(self, run: str, row: RunRow) -> dict[str, Any]:
        fields: dict[str, Any] = spelled(dataclasses.asdict(row))
        del fields["path"]  # it stays on the server
        self._send({"run": run, "row": fields})
        return fields

    def _digest(self, run: str, path: Path) -> Digest:
        if run not in self._open:
            cached = load_digest(path, digest_file(self._cache, run), within=self._root)
            self._open[run] = cached or Digest(path, within=self._root)
        return self._open[run]

    @contextlib.contextmanager
    def _unless_unreadable(self, run: str) -> Iterator[None]:
        """A run that cannot be read never hides the others: it costs its own row."""
        try:
            yield
        except FileNotFoundError:  # removed meanwhile: the next search will not find it
            return
        except Exception as error:  # noqa: BLE001  (logged, and shown in the run's row)
            if run not in self._warned:
                self._warned.add(run)
                logger.warning("%s cannot be read: %s", printable(run), printable(repr(error)))
            self._open.pop(run, None)
            if not isinstance(error, OSError):  # a disk that fails may work again
                with contextlib.suppress(OSError):
                    self._unsound[run], _ = log_signature(self._paths[run], within=self._root)
            self._send_row(run, unreadable_row(self._paths[run]))

    def _save_rows(self) -> None:
        self._rows_saved = time.monotonic()
        with contextlib.suppress(OSError):
            write_atomically(self._cache / ROWS_FILE, _json(self._rows))


def _cached_rows(path: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """The rows that were saved, each with the signature of its log."""
    try:
        saved = orjson.loads(read_file(path, most_bytes=MAX_ROWS_BYTES, within=path.parent))
        return {
            str(run): (str(signature), row)
            for run, (signature, row) in saved.items()
            if has_fields_of(RunRow, row, without="path")
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _last_written(path: Path) -> float:
    with contextlib.suppress(OSError):
        return log_dir(path).stat().st_mtime
    return 0.0


def _read_requests(requests: queue.SimpleQueue[Request | None]) -> None:
    for line in sys.stdin.buffer:
        requests.put(orjson.loads(line))
    requests.put(None)


def _pending(requests: queue.SimpleQueue[Request | None], *, wait: bool) -> Iterable[Request | None]:
    """Those that have come, equal ones once; waits for the first one if there is nothing else to do."""
    pending: list[Request | None] = []
    with contextlib.suppress(queue.Empty):
        pending.append(requests.get(block=wait))
        while True:
            pending.append(requests.get_nowait())
    return [request for number, request in enumerate(pending) if request not in pending[:number]]


def _send(answer: dict[str, Any]) -> None:
    sys.stdout.buffer.write(_json(answer) + b"\n")
    sys.stdout.buffer.flush()


def _json(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS, default=str)
