"""How the command line ends when something is wrong: one line, no traceback, an exit code that tells."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from harness import env
from harness.cli.output import say
from harness.errors import HarnessError

__all__ = ["Outcome", "reporting"]


@dataclass(slots=True)
class Outcome:
    """The exit code of a command."""

    exit_code: int = 0


@contextmanager
def reporting() -> Iterator[Outcome]:
    """Turns a `HarnessError` into a line on standard error and an exit code.

    The lowest of the ranks on which it arose prints it. HARNESS_TRACEBACK=1 shows where it came from.
    """
    outcome = Outcome()
    try:
        yield outcome
    except HarnessError as error:
        if env.wants_traceback():
            raise
        if env.launched().rank == min(error.ranks, default=0):
            where = f" on {_named(error.ranks)}" if error.ranks else ""
            say(f"{type(error).__name__}{where}: {error}", error=True)
        outcome.exit_code = error.exit_code


def _named(ranks: tuple[int, ...]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
