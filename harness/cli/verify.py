"""`harness verify RUN`: reads every checkpoint of a run and compares every checksum."""

from __future__ import annotations

from collections.abc import Sequence

from harness.checkpoint import CheckpointReport, verify
from harness.cli.arguments import checkpoint_directory, parser, run_argument, run_directory
from harness.cli.errors import reporting
from harness.cli.output import say

__all__ = ["EXIT_DAMAGED", "run"]

EXIT_DAMAGED = 1


def run(argv: Sequence[str]) -> int:
    """Prints a line per checkpoint; exit code 1 if one of them is damaged, 2 if there is no such run."""
    arguments = parser("verify", "Read all checkpoints of a run; exits with 1 if one of them is damaged.")
    run_argument(arguments)
    options = arguments.parse_args(argv)
    with reporting() as outcome:
        folder = checkpoint_directory(run_directory(options.run, options.runs))
        reports = verify(folder)
        say("\n".join(map(_line, reports)) or f"there are no checkpoints in {folder}")
        if not all(report.intact for report in reports):
            outcome.exit_code = EXIT_DAMAGED
    return outcome.exit_code


def _line(report: CheckpointReport) -> str:
    health = "healthy" if report.healthy else "pending"
    size = f"{report.size_bytes / 1e6:.1f} MB of {report.world_size} processes"
    state = "; ".join(report.problems) or f"intact, {health}, {size}"
    return f"step {report.step}: {state}"
