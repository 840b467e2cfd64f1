"""How the command line prints: names and texts may come from files that somebody else wrote."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from harness.tracking.text import printable

__all__ = ["say", "say_paths"]

PIPE_CLOSED = 128 + 13
"""The exit code that shells give a program which SIGPIPE ends."""


def say(text: str, *, error: bool = False) -> None:
    """Prints lines on standard output or standard error, without control sequences for terminals.

    Characters that the output's encoding lacks are replaced.

    Raises:
        SystemExit: nobody reads the output any more.
    """
    stream = sys.stderr if error else sys.stdout
    harmless = "\n".join(printable(line, longest=len(line)) for line in text.split("\n"))
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        print(harmless.encode(encoding, errors="replace").decode(encoding), file=stream, flush=True)
    except BrokenPipeError:  # its reader, such as `head`, has seen enough
        # Or the interpreter's last flush fails too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise SystemExit(PIPE_CLOSED) from None


def say_paths(paths: Iterable[Path]) -> None:
    """Prints a line for each path."""
    for path in paths:
        say(str(path).replace("\n", "�"))
