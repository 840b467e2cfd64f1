"""`harness runs`, `show`, `watch`, `compare`, `report`: looking at runs, live, finished or crashed.

They read the log alone, and never disturb a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness.cli.arguments import parser, run_argument, run_directory
from harness.cli.errors import reporting
from harness.cli.output import say, say_paths

__all__ = ["compare", "report", "runs", "show", "watch"]


def runs(argv: Sequence[str]) -> int:
    """Prints the table of all runs."""
    arguments = parser("runs", "State, step, loss, speed, skips and age of every run in a folder.")
    arguments.add_argument("runs", nargs="?", type=Path, default=Path("runs"), help="default: runs")
    options = arguments.parse_args(argv)
    with reporting() as outcome:
        from harness.tracking.overview import runs_table

        say(runs_table(options.runs))
    return outcome.exit_code


def show(argv: Sequence[str]) -> int:
    """Prints one run."""
    arguments = parser("show", "One run in words and numbers: state, metrics, events, settings.")
    run_argument(arguments)
    arguments.add_argument(
        "--incident",
        type=int,
        metavar="STEP",
        help="what is kept of the incident of a step, and nothing else",
    )
    options = arguments.parse_args(argv)
    with reporting() as outcome:
        from harness.tracking.incidents import show_incident
        from harness.tracking.overview import show_run

        directory = run_directory(options.run, options.runs)
        if options.incident is not None:
            say(show_incident(directory, options.incident))
        else:
            say(show_run(directory))
    return outcome.exit_code


def watch(argv: Sequence[str]) -> int:
    """Follows one run until it ends or Ctrl-C is pressed."""
    arguments = parser("watch", "Follow a run in the terminal until it ends.")
    run_argument(arguments)
    arguments.add_argument("--every", type=float, default=2.0, help="seconds between frames (default: 2)")
    arguments.add_argument("--once", action="store_true", help="draw once and leave")
    options = arguments.parse_args(argv)
    with reporting() as outcome:
        from harness.tracking.watch import watch_run

        try:
            watch_run(run_directory(options.run, options.runs), every_s=options.every, once=options.once)
        except KeyboardInterrupt:
            print()
    return outcome.exit_code


def compare(argv: Sequence[str]) -> int:
    """Prints how runs differ."""
    arguments = parser(
        "compare", "Settings and metrics that differ, and the first step at which runs part from the first."
    )
    run_argument(arguments, "a", "b")
    arguments.add_argument("more", nargs="*", help="further runs, each compared with the first")
    options = arguments.parse_args(argv)
    with reporting() as outcome:
        from harness.tracking.compare import compare_text

        names = (options.a, options.b, *options.more)
        say(compare_text(*(run_directory(name, options.runs) for name in names)))
    return outcome.exit_code


def report(argv: Sequence[str]) -> int:
    """Writes the HTML report and prints its path."""
    arguments = parser("report", "One self-contained HTML file about a run; opens offline.")
    run_argument(arguments)
    arguments.add_argument("-o", "--output", type=Path, help="default: report.html in the run's directory")
    options = arguments.parse_args(argv)
    with reporting() as outcome:
        from harness.dashboard.report import write_report

        say_paths([write_report(run_directory(options.run, options.runs), options.output)])
    return outcome.exit_code
