"""How the command line prints: names and texts may come from files that somebody else wrote."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from harness.tracking.text import printable

__all__ = ["say", "say_paths"]


def say(text: str, *, error: bool = False) -> None:
    """Prints lines on standard output or standard error, without control sequences for terminals.

    Characters that the output's encoding lacks are replaced.
    """
    stream = sys.stderr if error else sys.stdout
    harmless = "\n".join(printable(line, longest=len(line)) for line in text.split("\n"))
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(harmless.encode(encoding, errors="replace").decode(encoding), file=stream)


def say_paths(paths: Iterable[Path]) -> None:
    """Prints a line for each path."""
    for path in paths:
        say(str(path).replace("\n", "�"))
