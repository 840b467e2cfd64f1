"""Digests kept in files, so that a long log is read once and not again at every start.

A file is a line that names the format, the length of what follows, JSON, and the entries of all traces. It
is only a shortcut: one that is missing, damaged or of another log is made anew.
"""

from __future__ import annotations

import hashlib
import logging
import os
import struct
from pathlib import Path

import numpy as np
import orjson

from harness.tracking.digest import Digest
from harness.tracking.traces import ENTRY

__all__ = ["keep", "kept_path", "restored"]

logger = logging.getLogger(__name__)

_FORMAT = b"harness digest 2\n"
_LENGTH = struct.Struct("<Q")


def kept_path(folder: Path, run: str) -> Path:
    """Where in `folder` the digest of a run is kept; `run` is its path below the folder of runs."""
    return folder / f"{hashlib.sha256(run.encode(errors='surrogateescape')).hexdigest()[:32]}.digest"


def keep(digest: Digest, path: Path) -> bool:
    """Writes the digest down, in one piece or not at all; False, with a word in the log, if it cannot be."""
    about, arrays = digest.dump()
    header = orjson.dumps(about)
    unfinished = path.with_suffix(f".{os.getpid()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            file.write(_FORMAT + _LENGTH.pack(len(header)) + header)
            for entries in arrays:
                file.write(np.ascontiguousarray(entries).data)
        unfinished.replace(path)
    except OSError as error:
        logger.info("no digest of %s is kept: %s", digest.path, error)
        unfinished.unlink(missing_ok=True)
        return False
    return True


def restored(run_dir: Path, path: Path) -> Digest | None:
    """The digest as it was kept, to be refreshed; None if there is none of this log."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest = Digest(run_dir)
    try:
        if not data.startswith(_FORMAT):
            return None
        begin = len(_FORMAT) + _LENGTH.size
        end = begin + _LENGTH.unpack_from(data, len(_FORMAT))[0]
        entries = np.frombuffer(data, dtype=ENTRY, offset=end)
        return digest if digest.restore(orjson.loads(data[begin:end]), entries) else None
    except (ValueError, TypeError, LookupError, AttributeError, struct.error):  # damaged
        return None
