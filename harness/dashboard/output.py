"""What a program has printed, in chunks of plain text: no overwritten progress bars, no escape sequences."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

from harness.files import open_file

__all__ = ["LONGEST_BYTES", "plain_text", "read_output"]

LONGEST_BYTES = 200_000
"""Read at once. Of more than that the beginning is left out."""
QUIET_S = 1.0
"""A line without an end is shown when nothing has been added to it for so long."""

_ESCAPES = re.compile(
    r"\x1b[\]PX^_][^\x07\x1b\r\n]*(?:\x07|\x1b\\)?"  # titles, links and other strings
    r"|\x1b\[[0-?]*[ -/]*[@-~]?"  # colours, movements of the cursor
    r"|\x1b[ -/]*[0-~]?"
)
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def read_output(path: Path, offset: int, *, within: Path | None = None) -> tuple[str, int]:
    """The text in a growing file from byte `offset` on, and the offset of what comes next.

    Lines are given when they are complete, or have been silent for a second. Bytes that are no UTF-8 are
    replaced. An offset beyond the end, of a file that has been replaced, begins anew; no file is no text.
    No link is followed below `within`; see `harness.files.open_file`.
    """
    try:
        with open_file(path, within=within) as file:
            status = os.fstat(file.fileno())
            start = offset if 0 <= offset <= status.st_size else 0
            left_out = max(0, status.st_size - start - LONGEST_BYTES)
            file.seek(start + left_out)
            data = file.read(LONGEST_BYTES)
            before = os.pread(file.fileno(), 1, start - 1) if start else b"\n"
    except OSError:
        return "", 0
    is_quiet = time.time() - status.st_mtime > QUIET_S
    length = len(data) if is_quiet else _length_of_lines(data)
    text = plain_text(data[:length])
    if left_out:
        text = f"[{left_out} bytes are left out]\n{text.partition(chr(10))[2]}"
    elif data[:1] == b"\r" and before not in b"\r\n":
        text = f"\n{text}"  # a bar that is drawn again stands on a line of its own
    return text, start + left_out + length


def plain_text(data: bytes) -> str:
    """Printed bytes as plain text. Of what was drawn over and over on one line the last state stays."""
    text = _ESCAPES.sub("", data.decode("utf-8", errors="replace")).replace("\r\n", "\n")
    lines = [_last_state(line) for line in text.split("\n")]
    if text.endswith("\r"):
        lines.append("")
    return _CONTROLS.sub("", "\n".join(lines))


def _last_state(line: str) -> str:
    return next((state for state in reversed(line.split("\r")) if state.strip()), "")


def _length_of_lines(data: bytes) -> int:
    """Up to the last end of a line or of a bar's state. A carriage return at the end may be half of one."""
    length = max(data.rfind(b"\n"), data.rfind(b"\r", 0, len(data) - 1)) + 1
    return length or (len(data) if len(data) == LONGEST_BYTES else 0)
