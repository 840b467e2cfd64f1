"""Starts helper processes: modules of this package that run beside a trainer or a server."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from harness.env import child_environment

__all__ = ["start_helper"]

PROGRAM = Path(__file__).with_name("helper_main.py")


def start_helper(
    module: str,
    arguments: Sequence[object],
    *,
    stdin: int,
    stdout: int,
    stderr: int | IO[bytes] | None = None,
    pass_fds: Sequence[int] = (),
    yields: bool = False,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Calls `main(arguments)` of a module in a process of its own, in a session of its own.

    It runs this very package, installed or not, and takes no module from the working folder. Ctrl-C in a
    terminal does not reach it.

    Args:
        module: Full name of the module.
        arguments: What its `main` gets, as text.
        stdin: As `subprocess` takes it; `stdout` and `stderr` too.
        pass_fds: Descriptors that it inherits.
        yields: Gives way to all other processes from its first moment on.
        environment: Default: `child_environment()`.

    Raises:
        OSError: it cannot be started.
    """
    options = ["--yield-to-others"] if yields else []
    return subprocess.Popen(
        # -P: the folder of the program is no place to import from.
        [sys.executable, "-P", str(PROGRAM), *options, module, *map(str, arguments)],
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        pass_fds=pass_fds,
        start_new_session=True,
        env=dict(environment or child_environment()),
    )
