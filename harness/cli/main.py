"""The `harness` command: `harness COMMAND [arguments]`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import NamedTuple, NoReturn

from harness import __version__
from harness.parent import stop_with_launcher
from harness.stop import StopRequest

__all__ = ["COMMANDS", "ENTRY_POINTS", "added_commands", "main"]

ENTRY_POINTS = "harness.commands"
"""The group of entry points by which other packages add commands: functions `(argv) -> exit code`."""


class Command(NamedTuple):
    """Where a command lives, as a function `(argv) -> exit code` of a module here, and what it does."""

    module: str
    function: str
    what: str


COMMANDS = {
    "train": Command("train", "run", "train a model; the same program as harness/train.py"),
    "launch": Command("launch", "run", "files that start a run: Slurm, Kubernetes, torchrun, accelerate"),
    "doctor": Command("doctor", "run", "are these machines fit for a training?"),
    "runs": Command("look", "runs", "a table of all runs"),
    "show": Command("look", "show", "one run in words and numbers"),
    "watch": Command("look", "watch", "follow a run in the terminal"),
    "compare": Command("look", "compare", "how runs differ, and the first step at which they part"),
    "replay": Command("replay", "run", "run a step again and find what went wrong in it"),
    "report": Command("look", "report", "one self-contained HTML file about a run"),
    "export": Command(
        "export", "run", "a run's metrics (csv, parquet, json) or weights (safetensors, torch)"
    ),
    "sync": Command("sync", "run", "bring a run's mirrors up to its log, or rebuild them"),
    "dashboard": Command("dashboard", "run", "see every run in a browser, start one, stop one"),
    "verify": Command("verify", "run", "read a run's checkpoints and compare every checksum"),
    "completion": Command("completion", "run", "a script that completes all this in bash, zsh or fish"),
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
    added = {} if name in COMMANDS else added_commands()
    if name in added:
        return _run_added(added[name], arguments[1:])
    if name not in COMMANDS:
        print(
            f"harness: unknown command {name!r}; there are: {', '.join([*COMMANDS, *added])}", file=sys.stderr
        )
        return 2
    if name == "train" and argv is None:
        _train(arguments[1:])
    command = COMMANDS[name]
    function = getattr(importlib.import_module(f"harness.cli.{command.module}"), command.function)
    return int(function(arguments[1:]))


def added_commands() -> dict[str, EntryPoint]:
    """The commands of other packages that are installed."""
    return {point.name: point for point in entry_points(group=ENTRY_POINTS) if point.name not in COMMANDS}


def _run_added(point: EntryPoint, arguments: Sequence[str]) -> int:
    from harness.cli.errors import reporting

    with reporting() as outcome:
        function: Callable[[Sequence[str]], int] = point.load()
        outcome.exit_code = int(function(arguments))
    return outcome.exit_code


def _train(arguments: Sequence[str]) -> NoReturn:
    """The program `harness train`: as harness/train.py, signals are handled from its first moment on."""
    with StopRequest() as stop:
        stop_with_launcher()
        from harness.cli.train import train_and_exit

        train_and_exit(arguments, prog="harness train", stop=stop)


def _usage() -> str:
    whats = {name: command.what for name, command in COMMANDS.items()}
    whats |= {name: f"of {point.value.partition(':')[0]}" for name, point in added_commands().items()}
    width = max(map(len, whats))
    lines = [f"  {name:<{width}}  {what}" for name, what in whats.items()]
    return "\n".join(
        ["usage: harness COMMAND [arguments]", "", *lines, "", "`harness COMMAND --help` says more."]
    )
