"""Reads every run's log for the dashboard's table, in a process of its own that gives way to all others.

It is started by `catalogue`, takes orders from its standard input, `{"look": true}` and `{"want": RUN}`, and
answers on its standard output, each a line of JSON:

    {"runs": [RUN, ...]}                 what a search has found, newest first
    {"run": RUN, "glance": {...}}        a row of the table, at first from a peek at both ends of the log
    {"run": RUN, "read_frac": 0.25}      how far a long log has been read

Logs are read whole a little at a time, between orders. The digests of long ones are kept in files, which is
how the dashboard itself gets them, and so are the rows of runs that have ended. It imports no torch.
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
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson

from harness.atomic import write_atomically
from harness.files import read_file
from harness.runlog.digest import Digest, log_signature
from harness.runlog.digest_cache import keep, kept_path, restored
from harness.runlog.paths import log_dir
from harness.runlog.preview import LONG_BYTES, sample
from harness.tracking.overview import Glance, glance, no_glance, run_name, run_paths
from harness.tracking.text import printable

__all__ = ["Surveyor", "main"]

logger = logging.getLogger(__name__)

SEARCH_EVERY_S = 5.0
SLICE_S = 0.5
"""How long a long log is read on before orders are heard."""
KEEP_EVERY_S = 60.0
PEEK_BYTES = 16 << 10
TABLE = "table-2.json"
"""Its number goes up when the same log makes another row: rows are kept until their log grows."""
TABLE_BYTES = 256 << 20

Tell = Callable[[dict[str, Any]], None]


def main(arguments: Sequence[str]) -> None:
    """Serves until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--digests", type=Path, required=True, help="folder of those of long logs")
    options = parser.parse_args(arguments)
    orders: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(orders,), daemon=True).start()
    surveyor = Surveyor(options.runs, options.digests, _say)
    surveyor.look()
    while True:
        for order in _orders(orders, wait=not surveyor.has_unread):
            if order is None:
                return
            if "want" in order:
                surveyor.want(order["want"])
            else:
                surveyor.look()
        surveyor.read_on(SLICE_S)


class Surveyor:
    """Finds the runs below a folder and keeps account of them.

    Args:
        root: The folder.
        kept: Where digests of long logs are kept.
        tell: Takes the answers.
    """

    def __init__(self, root: Path, kept: Path, tell: Tell) -> None:
        self._root = root
        self._kept = kept
        self._tell = tell
        self._searched = -SEARCH_EVERY_S
        self._paths: dict[str, Path] = {}
        self._open: dict[str, Digest] = {}
        """Of runs that have not ended, and of the one that is being read."""
        self._unread: dict[str, float] = {}
        """Runs whose log is to be read whole, the next one first, and when what was read was last kept."""
        self._table = _read_table(kept / TABLE)
        self._has_told_table = False
        self._said: set[str] = set()
        """Runs of which it has been said that they cannot be read."""
        self._unsound: dict[str, str] = {}
        """Runs of whose log nothing can be made, with its signature: they wait until it grows."""
        self._table_kept = time.monotonic()

    @property
    def has_unread(self) -> bool:
        """Whether there are logs to be read on."""
        return bool(self._unread)

    def look(self) -> None:
        """Looks for runs, and at those whose log has grown or whose state may change by itself."""
        has_searched = time.monotonic() - self._searched >= SEARCH_EVERY_S
        if has_searched:
            self._search()
        for run, path in self._paths.items():
            if has_searched or run not in self._table:  # runs that have ended are looked at less often
                with self._unless_unreadable(run):
                    self._look_at(run, path)

    def want(self, run: str) -> None:
        """Somebody looks at this run: it is the next to be read."""
        if run in self._unread:
            self._unread = {run: self._unread.pop(run), **self._unread}

    def read_on(self, budget_s: float) -> None:
        """Reads logs on for a while; keeps the digest of a long one when it is complete or much was read."""
        deadline = time.monotonic() + budget_s
        while self._unread and (left_s := deadline - time.monotonic()) > 0:
            run, kept_at = next(iter(self._unread.items()))
            del self._unread[run]
            with self._unless_unreadable(run):
                if not self._read(run, self._paths[run], kept_at, left_s):
                    return
        if time.monotonic() - self._table_kept > KEEP_EVERY_S or not self._unread:
            self._keep_table()

    def _read(self, run: str, path: Path, kept_at: float, budget_s: float) -> bool:
        """Whether the log has been read to its end within the time; else it is the next one again."""
        digest = self._digest(run, path)
        signature, size = log_signature(path, within=self._root)
        is_complete = digest.refresh(budget_s=budget_s)
        if size > LONG_BYTES and (is_complete or time.monotonic() - kept_at > KEEP_EVERY_S):
            keep(digest, kept_path(self._kept, run))
            kept_at = time.monotonic()
        if is_complete:
            self._show(run, digest, signature)
        else:
            self._unread = {run: kept_at, **self._unread}
            self._tell({"run": run, "read_frac": digest.read_frac})
        return is_complete

    def _search(self) -> None:
        self._searched = time.monotonic()
        found = sorted(run_paths(self._root, within=self._root), key=_last_written, reverse=True)
        self._paths = {run_name(path, self._root): path for path in found}
        known: dict[str, Any]
        for known in (self._table, self._open, self._unread, self._unsound):
            for gone in set(known) - set(self._paths):
                del known[gone]
        self._tell({"runs": list(self._paths)})
        if not self._has_told_table:
            self._has_told_table = True
            for run, (_, row) in self._table.items():
                self._tell({"run": run, "glance": row})

    def _look_at(self, run: str, path: Path) -> None:
        signature, size = log_signature(path, within=self._root)
        is_known = signature in (self._table.get(run, ("", {}))[0], self._unsound.get(run))
        if is_known or run in self._unread:
            return
        self._table.pop(run, None)
        digest = self._open.get(run)
        if digest is None and size > PEEK_BYTES:
            self._unread[run] = time.monotonic()
            peek = sample(path, num_places=0, tail_bytes=PEEK_BYTES, within=self._root)
            self._tell_row(run, glance(peek))
        elif digest is not None and digest.bytes_behind() > LONG_BYTES:
            self._unread[run] = time.monotonic()
        else:
            digest = self._digest(run, path)
            digest.refresh()
            self._show(run, digest, signature)

    def _show(self, run: str, digest: Digest, signature: str) -> None:
        row = self._tell_row(run, glance(digest))
        if row["state"] not in ("running", "stale"):
            self._table[run] = (signature, row)  # it stays like that until the log grows
            self._open.pop(run, None)

    def _tell_row(self, run: str, one: Glance) -> dict[str, Any]:
        row = dataclasses.asdict(one)
        del row["path"]  # it stays on the server
        self._tell({"run": run, "glance": row})
        return row

    def _digest(self, run: str, path: Path) -> Digest:
        if run not in self._open:
            earlier = restored(path, kept_path(self._kept, run), within=self._root)
            self._open[run] = earlier or Digest(path, within=self._root)
        return self._open[run]

    @contextlib.contextmanager
    def _unless_unreadable(self, run: str) -> Iterator[None]:
        """One odd run never hides the others: it costs its own row."""
        try:
            yield
        except FileNotFoundError:  # removed meanwhile: the next search will not find it
            return
        except Exception as error:  # noqa: BLE001  (said, and shown in the run's row)
            if run not in self._said:
                self._said.add(run)
                logger.warning("%s cannot be read: %s", printable(run), printable(repr(error)))
            self._open.pop(run, None)
            if not isinstance(error, OSError):  # of a disk that fails it is asked again
                with contextlib.suppress(OSError):
                    self._unsound[run], _ = log_signature(self._paths[run], within=self._root)
            self._tell_row(run, no_glance(self._paths[run]))

    def _keep_table(self) -> None:
        self._table_kept = time.monotonic()
        with contextlib.suppress(OSError):
            write_atomically(self._kept / TABLE, _json(self._table))


def _read_table(path: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """The rows that were kept, each with the signature of its log."""
    try:
        kept = orjson.loads(read_file(path, most_bytes=TABLE_BYTES, within=path.parent))
        return {str(run): (str(signature), row) for run, (signature, row) in kept.items() if _is_row(row)}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _is_row(row: Any) -> bool:
    """Whether it is a `Glance` without its path, as JSON gives it back."""
    hints = typing.get_type_hints(Glance)
    return (
        isinstance(row, dict)
        and row.keys() == hints.keys() - {"path"}
        and all(_is_cell(value, hints[name]) for name, value in row.items())
    )


def _is_cell(value: Any, hint: Any) -> bool:
    if hint == tuple[str, ...]:
        return isinstance(value, list) and all(isinstance(one, str) for one in value)
    kinds = {float: (int, float), int: (int,), str: (str,), type(None): (type(None),)}
    return isinstance(
        value, tuple(kind for part in typing.get_args(hint) or (hint,) for kind in kinds.get(part, (str,)))
    )


def _last_written(path: Path) -> float:
    with contextlib.suppress(OSError):
        return log_dir(path).stat().st_mtime
    return 0.0


def _listen(orders: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    for line in sys.stdin.buffer:
        orders.put(orjson.loads(line))
    orders.put(None)


def _orders(
    orders: queue.SimpleQueue[dict[str, Any] | None], *, wait: bool
) -> Iterable[dict[str, Any] | None]:
    """Those that have come, several looks as one; waits for the first one if there is nothing else to do."""
    come: list[dict[str, Any] | None] = []
    with contextlib.suppress(queue.Empty):
        come.append(orders.get(block=wait))
        while True:
            come.append(orders.get_nowait())
    return [order for number, order in enumerate(come) if order not in come[:number]]


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.buffer.write(_json(answer) + b"\n")
    sys.stdout.buffer.flush()


def _json(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS, default=str)
