"""Runs a function on several gloo ranks, with a hard time limit and every rank's traceback."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed

__all__ = ["CONTEXT", "RanksFailed", "join", "run_ranks"]

CONTEXT = multiprocessing.get_context("forkserver")
# The server imports once what ranks import, and forks each of them from there: a rank starts in milliseconds.
# Nothing of this may start a thread. (torch.optim imports torch._dynamo when a first optimizer is made, which
# takes longer than most of what ranks do here.)
CONTEXT.set_forkserver_preload(
    [
        "torch._dynamo",
        "torch.distributed.fsdp",
        "torch.distributed.checkpoint",
        "harness.training",
        "pytest",
        "tests.support.distributed",
    ]
)


class RanksFailed(AssertionError):
    """At least one rank raised, died or hung; the message holds what each of them left."""


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 60.0
) -> list[Any]:
    """Calls `function(rank, world_size, *args)` in `world_size` processes of one gloo group.

    Args:
        function: Importable by name (not a closure); what it returns has to be picklable.
        timeout_s: After this the ranks that still run are killed and the call fails.

    Returns:
        What each rank returned, by rank.

    Raises:
        RanksFailed: a rank raised (its traceback is in the message), died by a signal, or hung.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        ranks = [
            CONTEXT.Process(target=_rank_main, args=(function, rank, world_size, folder, args), daemon=True)
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        hung = join(ranks, timeout_s)
        return _collect(ranks, hung, Path(folder), timeout_s)


def join(ranks: list[Any], timeout_s: float) -> list[int]:
    """Waits for all ranks; once one has failed, the others get a short grace before they are killed.

    Returns:
        The ranks that were killed.
    """
    deadline = time.monotonic() + timeout_s
    running = dict(enumerate(ranks))
    while running and time.monotonic() < deadline:
        wait([p.sentinel for p in running.values()], timeout=deadline - time.monotonic())
        for rank in [rank for rank, process in running.items() if not process.is_alive()]:
            if running.pop(rank).exitcode != 0:
                deadline = min(deadline, time.monotonic() + 5.0)
    for process in running.values():
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    return list(running)


def _collect(ranks: list[Any], hung: list[int], folder: Path, timeout_s: float) -> list[Any]:
    results, complaints = [], []
    for rank, process in enumerate(ranks):
        outcome = folder / f"rank-{rank}.pickle"
        if outcome.exists() and process.exitcode == 0:
            results.append(pickle.loads(outcome.read_bytes()))
            continue
        said = folder / f"rank-{rank}.traceback"
        state = f"still running after {timeout_s} s" if rank in hung else f"exit code {process.exitcode}"
        complaints.append(f"rank {rank}: {state}\n{said.read_text() if said.exists() else ''}")
    if complaints:
        raise RanksFailed("\n".join(complaints))
    return results


def _rank_main(
    function: Callable[..., Any], rank: int, world_size: int, folder: str, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    try:
        torch.distributed.init_process_group(
            "gloo",
            store=torch.distributed.FileStore(f"{folder}/store", world_size),
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=30),
        )
        result = function(rank, world_size, *args)
        Path(folder, f"rank-{rank}.pickle").write_bytes(pickle.dumps(result))
        torch.distributed.barrier()
        code = 0
    except BaseException:  # noqa: BLE001  (reported to the parent, whatever it is)
        Path(folder, f"rank-{rank}.traceback").write_text(traceback.format_exc())
        traceback.print_exc()
        code = 1
    # Ranks end here: interpreter shutdown with live gloo threads aborts now and then.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
