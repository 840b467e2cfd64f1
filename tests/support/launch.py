"""Runs the whole program on several ranks, without the time that torchrun and each rank take to load.

The ranks are forked from the server that `run_ranks` uses, with a launcher's variables. What torchrun itself
does is tested in `tests/integration/test_launchers.py`.
"""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.distributed import TCPStore

from tests.support.distributed import CONTEXT, join
from tests.support.runs import PROGRAM

__all__ = ["launch"]


def launch(
    arguments: Sequence[str],
    *,
    world_size: int = 2,
    timeout_s: float = 90.0,
    cwd: Path | None = None,
    **environment: str,
) -> tuple[int, str]:
    """Runs the program to its end; the first exit code that is not 0 by rank, and all that the ranks said.

    Once a rank has failed the others get a few seconds; they are killed then, as a launcher does it.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = {
        **os.environ,
        **environment,
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 opens no store: this process has one
    }
    with tempfile.TemporaryDirectory(prefix="launch-") as folder:
        output = Path(folder, "output")
        ranks = [
            CONTEXT.Process(
                target=_run,
                args=(
                    list(arguments),
                    {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    str(cwd or Path.cwd()),
                    str(output),
                ),
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        hung = join(ranks, timeout_s)
        said = output.read_text(errors="replace")
    codes = [process.exitcode for process in ranks]
    if hung and not any(code for rank, code in enumerate(codes) if rank not in hung):
        raise AssertionError(f"the ranks {hung} still ran after {timeout_s} s:\n{said}")
    return next((code for code in codes if code), 0), said


def _run(arguments: list[str], variables: dict[str, str], cwd: str, output: str) -> None:
    """One rank. The program ends the process itself."""
    written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(written, 1)
    os.dup2(written, 2)
    sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))  # noqa: SIM115
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(cwd)
    torch.set_num_threads(1)
    # As a new process has it: the program's folder first, which it replaces, then PYTHONPATH.
    sys.path[:0] = [str(Path(PROGRAM).parent), *variables.get("PYTHONPATH", "").split(os.pathsep)]
    sys.argv = [PROGRAM, *arguments]
    runpy.run_path(PROGRAM, run_name="__main__")
