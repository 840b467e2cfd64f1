"""What the small commands have in common: a parser, and a run that is named by its directory or its name."""

from __future__ import annotations

import argparse
import difflib
import os
from pathlib import Path

from harness.errors import TrackingError
from harness.runlog.paths import checkpoint_of
from harness.runlog.reader import is_run
from harness.tracking.overview import run_name, run_paths
from harness.tracking.places import checkpoints_of
from harness.tracking.text import printable

__all__ = ["RUN_HELP", "checkpoint_directory", "parser", "run_argument", "run_directory"]

RUN_HELP = "a run's directory, or its name"
"""What `--help` says of an argument that is a run."""


def parser(command: str, description: str) -> argparse.ArgumentParser:
    """An argument parser for `harness COMMAND`."""
    return argparse.ArgumentParser(prog=f"harness {command}", description=description)


def run_argument(arguments: argparse.ArgumentParser, *names: str) -> None:
    """Adds positional runs under `names` (default: `run`) and the folder in which names are looked up."""
    for name in names or ("run",):
        arguments.add_argument(name, help=RUN_HELP)
    arguments.add_argument("--runs", type=Path, default=Path("runs"), help="folder of runs (default: runs)")


def run_directory(name: str, runs: Path) -> Path:
    """The directory that `name` is the path of, else the run of that name in `runs`.

    Raises:
        TrackingError: there is neither; the runs that are called nearly so are named.
    """
    found = [path for path in (Path(name), runs / name) if os.path.isdir(path)]
    for path in found:
        if is_run(path):
            return path
    if found:
        return found[0]
    raise TrackingError(
        f"there is no run {name[:200]!r}",
        rule=f"a run is named by its directory, or by its path below {runs}",
        remedy=_nearest(name, runs),
    )


def checkpoint_directory(directory: Path) -> Path:
    """The folder of a run's checkpoints, or the directory itself where it is such a folder.

    Raises:
        TrackingError: it is neither a run nor holds checkpoints.
    """
    if any(checkpoint_of(path.name) for path in directory.glob("*")):
        return directory
    folder = checkpoints_of(directory)
    if not is_run(directory) and not folder.is_dir():
        raise TrackingError(
            f"{directory} is not a run, and holds no checkpoints",
            rule="a run directory holds a folder `log`, a folder of checkpoints holds folders `step-N`",
            remedy="`harness runs` lists the runs that there are",
        )
    return folder


def _nearest(name: str, runs: Path) -> str:
    names = [run_name(path, runs) for path in run_paths(runs)]
    by_last_part = {each.rpartition("/")[2]: each for each in names}
    near = difflib.get_close_matches(name, [*names, *by_last_part], n=3, cutoff=0.5)
    wanted = dict.fromkeys(by_last_part.get(each, each) for each in near)
    return (
        f"did you mean {' or '.join(map(printable, wanted))}?"
        if wanted
        else f"`harness runs {runs}` lists what there is"
    )
