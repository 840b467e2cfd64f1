"""`harness sync RUN`: brings TensorBoard and Weights & Biases up to the log."""

from __future__ import annotations

from collections.abc import Sequence

from harness.cli.arguments import parser, run_argument, run_directory
from harness.cli.errors import reporting

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    """Completes or rebuilds the mirrors and says what was done."""
    arguments = parser("sync", "Bring a run's mirrors up to its log; idempotent.")
    run_argument(arguments)
    arguments.add_argument(
        "--wandb", choices=("off", "offline", "online"), default="off", help="mirror to W&B"
    )
    arguments.add_argument("--project", default="harness", help="W&B project")
    arguments.add_argument("--rebuild", action="store_true", help="begin again from the log's first record")
    options = arguments.parse_args(argv)
    with reporting() as outcome:
        from harness.tracking.sync import sync_run

        directory = run_directory(options.run, options.runs)
        said = sync_run(directory, rebuild=options.rebuild, wandb=options.wandb, project=options.project)
        print("\n".join(said) or "the mirrors are complete")
    return outcome.exit_code
