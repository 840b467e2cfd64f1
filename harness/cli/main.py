"""The `harness` command: `harness COMMAND [arguments]`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from harness import __version__

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "train": "train a model; the same program as harness/train.py",
}
"""Each command is a module of this package with a function `run(argv) -> int`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name == "--version":
        print(f"harness {__version__}")
        return 0
    if name not in COMMANDS:
        print(f"harness: unknown command {name!r}; there are: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return int(importlib.import_module(f"harness.cli.{name}").run(arguments[1:]))


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        ["usage: harness COMMAND [arguments]", "", *lines, "", "`harness COMMAND --help` says more."]
    )
