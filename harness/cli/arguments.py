"""What the small commands have in common: a parser, and a run that is named by its directory or its name."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["parser", "run_argument", "run_directory"]


def parser(command: str, description: str) -> argparse.ArgumentParser:
    """An argument parser for `harness COMMAND`."""
    return argparse.ArgumentParser(prog=f"harness {command}", description=description)


def run_argument(arguments: argparse.ArgumentParser, *names: str) -> None:
    """Adds positional runs under `names` (default: `run`) and the folder in which names are looked up."""
    for name in names or ("run",):
        arguments.add_argument(name, help="a run's directory, or its name")
    arguments.add_argument("--runs", type=Path, default=Path("runs"), help="folder of runs (default: runs)")


def run_directory(name: str, runs: Path) -> Path:
    """The directory itself if there is one of that name, else the run of that name in `runs`."""
    path = Path(name)
    return path if path.exists() or not (runs / name).exists() else runs / name
