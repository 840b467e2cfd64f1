"""The errors that users see.

Each says three things: the problem with the offending value in it, the rule that it broke, and the
remedy. The command line prints them as one line without a traceback and exits with `exit_code`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "HarnessError",
    "InstabilityError",
    "LaunchError",
    "LostRankError",
    "ReplayError",
    "TaskError",
    "TrackingError",
    "needs",
]


@contextmanager
def needs(package: str, *, extra: str) -> Iterator[None]:
    """Around the imports of an optional package: where it is not installed, the error names its extra.

    Raises:
        ModuleNotFoundError: as Python does, so that callers who try an import need no other error.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise  # installed, and broken: that is another story
        remedy = f"{package} is not installed. Run pip install 'stability-harness[{extra}]'."
        raise ModuleNotFoundError(remedy, name=package) from error


class HarnessError(Exception):
    """Base of all errors that are meant for the user rather than for the developer.

    Args:
        problem: What is wrong, with the value that is wrong in it.
        rule: What would have been right.
        remedy: What to do about it; a command where there is one.
    """

    exit_code = 2

    restart_may_help = False
    """Whether the same program may succeed if it is started again, as launchers do."""

    ranks: tuple[int, ...] | None = None
    """The ranks on which it arose, empty: all; the lowest of them prints it. None: not known, there is one
    only, or they had not met yet; the first of each machine prints it."""

    def __init__(self, problem: str, *, rule: str = "", remedy: str = "") -> None:
        self.problem = problem
        self.rule = rule
        self.remedy = remedy
        super().__init__(_sentence(": ".join(part for part in (problem, rule) if part)) + _remedy(remedy))

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword arguments are not in `args`, so the default would lose them between processes.
        return _rebuild, (type(self), self.problem, self.rule, self.remedy), self.__dict__


def _sentence(text: str) -> str:
    return text if text.endswith((".", "?", "!")) else f"{text}."


def _remedy(text: str) -> str:
    return f" {text[0].upper()}{_sentence(text[1:])}" if text else ""


def _rebuild(kind: type[HarnessError], problem: str, rule: str, remedy: str) -> HarnessError:
    return kind(problem, rule=rule, remedy=remedy)


class ConfigError(HarnessError):
    """A configuration that cannot be run: unknown key, wrong type, impossible value or combination."""


class DataError(HarnessError):
    """Input data that is missing, unreadable, empty or too short."""


class TaskError(HarnessError):
    """Code of the user's own raised something: a task, its data set, its loss, a callback, a spike rule.

    `frames` are the lines of the traceback that are the user's own; the original error is the `__cause__`
    where it was raised in this process.
    """

    frames: str = ""

    def __str__(self) -> str:
        return f"{super().__str__()}\n{self.frames}" if self.frames else super().__str__()


class CheckpointError(HarnessError):
    """A checkpoint that is missing, damaged or belongs to another model or run."""


class LaunchError(HarnessError):
    """The processes, devices or ports are not what the launch asked for."""


class LostRankError(LaunchError):
    """Other ranks did not come, failed or went away."""

    restart_may_help = True

    stacks: str | None = None
    """The folder in which the ranks of a run that hangs have left theirs."""


class TrackingError(HarnessError):
    """A run's log cannot be written or read. A mirror that fails never raises this in the trainer."""


class ReplayError(HarnessError):
    """A step that cannot be replayed: it is not in the log, or nothing is left to begin from."""


class InstabilityError(HarnessError):
    """Training was stopped because its numbers could not be trusted any more."""

    exit_code = 3
