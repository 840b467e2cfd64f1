"""Digests cached in files, so that a long log is read once and not again at every start.

A file is a line that names the format, a checksum of the rest, the length of what follows, JSON, and the
entries of all traces. It is only a shortcut: one that is missing, damaged or of another log is made anew.
"""

from __future__ import annotations

import hashlib
import logging
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import orjson

from harness.atomic import replacing
from harness.errors import TrackingError
from harness.files import read_file
from harness.runlog.digest import Digest
from harness.runlog.traces import ENTRY

__all__ = ["digest_file", "load_digest", "save_digest"]

logger = logging.getLogger(__name__)

_FORMAT = b"harness digest 4\n"
_HEAD = struct.Struct("<IQ")
"""CRC-32 of what follows it, and the length of the JSON."""
LONGEST_BYTES = 2 << 30


def digest_file(folder: Path, run: str) -> Path:
    """Where in `folder` the digest of a run is cached; `run` is its path below the folder of runs."""
    return folder / f"{hashlib.sha256(run.encode(errors='surrogateescape')).hexdigest()[:32]}.digest"


def save_digest(digest: Digest, path: Path) -> bool:
    """Writes the digest down, in one piece or not at all; False, with a word in the log, if it cannot be."""
    try:
        about, arrays = digest.dump()
        header = orjson.dumps(about)
        parts = [memoryview(header), *(np.ascontiguousarray(entries).data.cast("B") for entries in arrays)]
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as unfinished, unfinished.open("wb") as file:
            file.write(_FORMAT + _HEAD.pack(_checksum(parts), len(header)))
            file.writelines(parts)
    except (OSError, TrackingError) as error:
        logger.info("no digest of %s is cached: %s", digest.path, error)
        return False
    return True


def load_digest(run_dir: Path, path: Path, *, within: Path | None = None) -> Digest | None:
    """The digest as it was saved, to be refreshed; None if there is none of this log.

    Args:
        run_dir: The run's directory.
        path: The file; its folder is the dashboard's own.
        within: Below which no link is followed in the run's directory; see `harness.files.open_file`.
    """
    try:
        data = read_file(path, most_bytes=LONGEST_BYTES, within=path.parent)
    except OSError:
        return None
    digest = Digest(run_dir, within=within)
    try:
        if not data.startswith(_FORMAT):
            return None
        begin = len(_FORMAT) + _HEAD.size
        checksum, length = _HEAD.unpack_from(data, len(_FORMAT))
        if _checksum([memoryview(data)[begin:]]) != checksum:
            return None
        end = begin + length
        entries = np.frombuffer(data, dtype=ENTRY, offset=end)
        return digest if digest.restore(orjson.loads(data[begin:end]), entries) else None
    except (ValueError, TypeError, LookupError, AttributeError, OSError, struct.error):  # damaged
        return None


def _checksum(parts: Iterable[memoryview]) -> int:
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return checksum
