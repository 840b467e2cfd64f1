"""Reads W&B's offline file back with wandb's own record type; the package ships no reader for it."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

__all__ = ["history", "records"]

BLOCK = 32 * 1024
HEAD = struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[Record]:
    """The file's records: a 7-byte head, then LevelDB log framing in blocks of 32 KiB."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    offset, parts = 7, b""
    while offset + HEAD.size <= len(data):
        left = BLOCK - offset % BLOCK
        if left < HEAD.size:
            offset += left
            continue
        checksum, length, kind = HEAD.unpack_from(data, offset)
        body = data[offset + HEAD.size : offset + HEAD.size + length]
        if kind == 0 or len(body) < length:
            return
        assert checksum == zlib.crc32(bytes([kind]) + body), "a damaged block"
        parts = body if kind in (FULL, FIRST) else parts + body
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(parts)
            yield record
        offset += HEAD.size + length


def history(run_dir: Path) -> list[dict[str, Any]]:
    """All rows of all offline files of a run, by W&B's own step; of equal ones the last."""
    rows: dict[int, dict[str, Any]] = {}
    for path in sorted((run_dir / "wandb").glob("offline-run-*/*.wandb")):
        for record in records(path):
            if record.WhichOneof("record_type") == "history":
                row = {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                    for item in record.history.item
                }
                rows[record.history.step.num] = row
    return [rows[step] for step in sorted(rows)]
