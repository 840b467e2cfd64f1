"""How the command line ends when something is wrong: one line, no traceback, an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from harness import env
from harness.cli.output import say
from harness.errors import HarnessError, LaunchError

__all__ = ["Outcome", "reporting"]


@dataclass(slots=True)
class Outcome:
    """The exit code of a command, and the error that was printed."""

    exit_code: int = 0
    printed: HarnessError | None = None
    error: HarnessError | None = None
    """That it failed with."""

    @property
    def is_final(self) -> bool:
        """Whether it failed, and would fail again."""
        return self.error is not None and not self.error.restart_may_help

    @property
    def speaks(self) -> bool:
        """Whether it is this process, one of its machine, that tells the launcher: the first on which the
        error arose, for the others may hang or be gone; the first of the machine if it arose elsewhere."""
        launched = _launched()
        first = launched.rank - launched.local_rank
        here = range(first, first + launched.local_world_size)
        arose = [rank for rank in (self.error and self.error.ranks) or () if rank in here]
        return launched.rank == min(arose, default=first)

    def report(self, error: HarnessError) -> None:
        """Prints `error`, once, if it is this process that does."""
        if error is self.printed or env.wants_traceback():
            return
        self.printed = error
        if _prints(error):
            where = f" on {_ranks_text(error.ranks)}" if error.ranks else ""
            say(f"{type(error).__name__}{where}: {error}", error=True)


@contextmanager
def reporting(outcome: Outcome | None = None) -> Iterator[Outcome]:
    """Turns a `HarnessError` into a line on standard error and an exit code, noted in `outcome`.

    The lowest of the ranks on which it arose prints it; the first of each machine, if they had not met yet.
    HARNESS_TRACEBACK=1 shows where it came from.
    """
    outcome = outcome or Outcome()
    try:
        yield outcome
    except HarnessError as error:
        outcome.error = error
        if env.wants_traceback():
            raise
        outcome.report(error)
        outcome.exit_code = error.exit_code


def _prints(error: HarnessError) -> bool:
    launched = _launched()
    if error.ranks is None:
        return launched.local_rank == 0
    return launched.rank == min(error.ranks, default=0)


def _launched() -> env.Launched:
    """A process that cannot tell which one it is speaks for itself."""
    try:
        return env.launched()
    except LaunchError:
        return env.Launched()


def _ranks_text(ranks: tuple[int, ...]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
