"""torchrun's agent with ranks that are forked from a server which has loaded all: a restart takes a second.

    python -m tests.support.forked_agent --max-restarts=3 PROGRAM ARGUMENT...

The agent, its store and its restarts are torch's own, and what the ranks run is what PROGRAM runs.
"""

from __future__ import annotations

import argparse
import os
import sys
import uuid

import psutil
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from harness.cli.train import run
from tests.support.distributed import CONTEXT

__all__ = ["NUM_RANKS", "is_forked_rank"]

NUM_RANKS = 2


def is_forked_rank(process: psutil.Process) -> bool:
    """Whether the server forked it."""
    parent = process.parent()
    return parent is not None and all("forkserver" in " ".join(one.cmdline()) for one in (parent, process))


def _rank_main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    exit_code = run(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    if exit_code:
        os._exit(exit_code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-restarts", type=int, default=0)
    parser.add_argument("program")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=NUM_RANKS,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=options.max_restarts,
        start_method=CONTEXT.get_start_method(),
    )
    elastic_launch(config, _rank_main)(options.arguments)


if __name__ == "__main__":
    main()
