"""The `harness` command: `harness COMMAND [arguments]`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from harness import __version__
from harness.parent import stop_with_launcher
from harness.stop import StopRequest

__all__ = ["COMMANDS", "main"]


class Command(NamedTuple):
    """Where a command lives, as a function `(argv) -> exit code` of a module here, and what it does."""

    module: str
    function: str
    what: str


COMMANDS = {
    "train": Command("train", "run", "train a model; the same program as harness/train.py"),
    "runs": Command("look", "runs", "a table of all runs"),
    "show": Command("look", "show", "one run in words and numbers"),
    "watch": Command("look", "watch", "follow a run in the terminal"),
    "compare": Command("look", "compare", "how two runs differ, and the first step at which they part"),
    "report": Command("look", "report", "one self-contained HTML file about a run"),
    "export": Command(
        "export", "run", "a run's metrics (csv, parquet, json) or weights (safetensors, torch)"
    ),
    "sync": Command("sync", "run", "bring a run's mirrors up to its log, or rebuild them"),
    "dashboard": Command("dashboard", "run", "see every run in a browser, start one, stop one"),
    "verify": Command("verify", "run", "read a run's checkpoints and compare every checksum"),
}


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
    if name == "train" and argv is None:
        _train(arguments[1:])
    command = COMMANDS[name]
    function = getattr(importlib.import_module(f"harness.cli.{command.module}"), command.function)
    return int(function(arguments[1:]))


def _train(arguments: Sequence[str]) -> NoReturn:
    """The program `harness train`: as harness/train.py, signals are handled from its first moment on."""
    with StopRequest() as stop:
        stop_with_launcher()
        from harness.cli.train import train_and_exit

        train_and_exit(arguments, prog="harness train", stop=stop)


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.what}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: harness COMMAND [arguments]", "", *lines, "", "`harness COMMAND --help` says more."]
    )
