"""`harness train`: one complete run from a configuration."""

from __future__ import annotations

from collections.abc import Sequence

from harness.cli.errors import reporting
from harness.config import parse_arguments

__all__ = ["EXIT_STOPPED", "run"]

EXIT_STOPPED = 75
"""Stopped on request with a checkpoint committed: the same command goes on (EX_TEMPFAIL of sysexits.h)."""


def run(argv: Sequence[str], *, prog: str = "harness train") -> int:
    """Trains; returns the exit code: 0 finished, 75 stopped and saved, 2 bad input, 3 unstable."""
    with reporting() as outcome:
        config = parse_arguments(argv, prog=prog)
        from harness.training import train  # after the arguments, so that --help does not wait for torch

        result = train(config, tell=outcome.tell)
        outcome.exit_code = 0 if result.status == "finished" else EXIT_STOPPED
    return outcome.exit_code
