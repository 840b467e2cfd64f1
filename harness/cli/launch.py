"""`harness launch`: the files that come with the package for torchrun, accelerate, Slurm and Kubernetes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from harness.cli.arguments import parser
from harness.cli.output import say

__all__ = ["run"]

_FOLDER = Path(__file__).parents[1] / "launch"


def run(argv: Sequence[str]) -> int:
    """Lists the launch files, or prints one of them."""
    files = {path.stem: path for path in sorted(_FOLDER.iterdir()) if path.is_file()}
    arguments = parser(
        "launch",
        "List the launch files that come with the package, or print one, to be kept in a file and changed.",
    )
    arguments.add_argument("--print", dest="name", choices=files, help="print this file")
    name = arguments.parse_args(argv).name
    if name is not None:
        sys.stdout.write(files[name].read_text(encoding="utf-8"))
    else:
        for name, path in files.items():
            say(f"{name:<12}{path}")
    return 0
