"""`harness train`: one complete run from a configuration."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import traceback
from collections.abc import Sequence
from typing import NoReturn

from harness.cli.errors import Outcome, reporting
from harness.cli.output import say
from harness.config import parse_arguments
from harness.parent import clear_exit_note, end_launcher, leave_exit_note
from harness.runlog.process import age_s
from harness.stop import StopRequest

__all__ = ["EXIT_CRASHED", "EXIT_STOPPED", "run", "train_and_exit"]

EXIT_CRASHED = 1
EXIT_STOPPED = 75
"""Stopped on request with a checkpoint committed: the same command goes on (EX_TEMPFAIL of sysexits.h)."""


def run(argv: Sequence[str], *, prog: str = "harness train", stop: StopRequest | None = None) -> int:
    """Trains; returns the exit code: 0 finished, 75 stopped and saved, 2 bad input, 3 unstable.

    What another start would not cure is said to torchrun's agent too, which else would try it again.
    """
    outcome = Outcome()
    clear_exit_note()
    try:
        with reporting(outcome):
            config = parse_arguments(argv, prog=prog)
            # After the arguments, so that --help does not wait for torch.
            from harness.training import forecast_memory, train

            if config.dry_run:
                say(forecast_memory(config, num_ranks=config.dry_run).text())
                outcome.exit_code = 0
                return 0
            try:
                begun = (
                    None if stop is None else time.monotonic() - age_s()
                )  # the program trains, and no more
                result = train(config, tell=outcome.report, stop=stop, begun=begun)
            except SystemExit as leaving:  # a launcher would take its code for the run's
                raise RuntimeError(f"the run was left by SystemExit({leaving.code!r})") from leaving
            outcome.exit_code = 0 if result.status == "finished" else EXIT_STOPPED
    finally:
        if outcome.is_final or outcome.exit_code == EXIT_STOPPED:
            leave_exit_note(outcome.exit_code)
        if outcome.is_final:
            end_launcher(speaks=outcome.speaks)
    return outcome.exit_code


def train_and_exit(argv: Sequence[str], *, prog: str, stop: StopRequest) -> NoReturn:
    """`run`, and the end of the process with its exit code; 1 and a traceback where nothing was foreseen."""
    try:
        exit_code = run(argv, prog=prog, stop=stop)
    except SystemExit as leaving:  # --help
        exit_code = leaving.code if isinstance(leaving.code, int) else EXIT_CRASHED
    except BaseException:  # noqa: BLE001  (shown; the process ends with it)
        traceback.print_exc()
        exit_code = EXIT_CRASHED
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads there any more
            stream.flush()
    # All is written and closed by now. Shutting the interpreter down beside gloo's threads aborts now and
    # then, and a launcher would take that for a failure; and whatever hangs there would keep the job waiting.
    os._exit(exit_code)
