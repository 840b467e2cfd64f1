"""`harness sync RUN`: brings TensorBoard, Weights & Biases and other mirrors up to the log."""

from __future__ import annotations

from collections.abc import Sequence

from harness.cli.arguments import parser, run_argument, run_directory
from harness.cli.errors import reporting
from harness.cli.output import say

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    """Completes or rebuilds the mirrors and prints what was done."""
    arguments = parser("sync", "Bring a run's mirrors (TensorBoard, W&B, ...) up to date with its log.")
    run_argument(arguments)
    default = "(default: as in the run's own settings)"
    arguments.add_argument(
        "--mirror",
        action="append",
        default=[],
        metavar="NAME",
        help="tensorboard, wandb, trackio or package.module:Class; only those named here (default: all that "
        "the run had)",
    )
    arguments.add_argument("--wandb", choices=("off", "offline", "online"), help=f"mirror to W&B {default}")
    arguments.add_argument("--project", help=f"project at W&B and in trackio {default}")
    arguments.add_argument("--rebuild", action="store_true", help="rebuild them from the log's first record")
    options = arguments.parse_args(argv)
    with reporting() as outcome:
        from harness.tracking.sync import sync_run

        asked = {"wandb": options.wandb, "project": options.project}
        changes = {name: value for name, value in asked.items() if value is not None}
        directory = run_directory(options.run, options.runs)
        mirrors = sync_run(directory, rebuild=options.rebuild, mirrors=options.mirror, **changes)
        say(f"up to the log's end: {', '.join(mirrors)}" if mirrors else "this run has no mirrors")
    return outcome.exit_code
