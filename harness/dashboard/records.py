"""What is known of programs that were started here.

It stands beside the runs, since a run's own directory has to be empty until the run makes it:

    runs/.dashboard/NAME/config.yaml     what it was started with
    runs/.dashboard/NAME/output.log      what it has printed, of all attempts
    runs/.dashboard/NAME/program.json    its process, and how it ended
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from harness.atomic import write_atomically
from harness.errors import ConfigError
from harness.files import read_file
from harness.locks import locked
from harness.runlog.process import is_alive

__all__ = ["OUTPUT_FILE", "RECORDS", "Program", "hold_records", "note", "noted", "records_of"]

RECORDS = ".dashboard"
"""Folder, beside the runs, of what is known of their programs."""
OUTPUT_FILE = "output.log"
_PROCESS_FILE = "program.json"
MAX_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """The newest attempt at a run that was started here."""

    directory: Path
    """The run's, which need not exist yet."""
    command: tuple[str, ...]
    processes: int
    pid: int
    """Of the training itself, or of torchrun's agent where there are several processes."""
    process_start: float
    machine: str
    host: str
    started: float
    """Seconds since the epoch."""
    exit_code: int | None = None
    """0: finished, 75: stopped with a checkpoint, negative: ended by that signal; of several processes
    torchrun says 1 for all that is not 0. None: it runs, or ended after the dashboard that had started it."""

    @property
    def name(self) -> str:
        """The run's name."""
        return self.directory.name

    def is_sound(self) -> bool:
        """Whether the fields are of their types: the file may be anybody's."""
        numbers = (self.process_start, self.started)
        return (
            all(type(number) is int for number in (self.processes, self.pid))
            and all(isinstance(number, int | float) for number in numbers)
            and isinstance(self.machine, str)
            and isinstance(self.host, str)
            and (self.exit_code is None or type(self.exit_code) is int)
            and all(isinstance(part, str) for part in self.command)
        )

    def is_running(self) -> bool:
        """Whether it still runs, on this machine."""
        return self.exit_code is None and is_alive(dataclasses.asdict(self)) is True


def records_of(directory: Path) -> Path:
    """The folder of what is known of a run's program."""
    return directory.parent / RECORDS / directory.name


@contextlib.contextmanager
def hold_records(directory: Path) -> Iterator[Path]:
    """The same folder, made if need be and held by one at a time.

    Raises:
        ConfigError: nothing can be written there.
    """
    records = records_of(directory)
    try:
        records.mkdir(parents=True, exist_ok=True)
        lock = contextlib.ExitStack()
        lock.enter_context(locked(records / "lock"))
    except OSError as error:
        raise ConfigError(
            f"cannot write to {records}: {error.strerror}",
            rule="the dashboard notes there what it starts",
            remedy="look after the disk, or choose another folder for runs",
        ) from error
    with lock:
        yield records


def noted(records: Path, directory: Path, *, within: Path | None = None) -> Program | None:
    """What was noted last; None if nothing can be read.

    Args:
        within: The folder of runs, below which no link is followed; None: the one that holds the run.
    """
    try:
        content = read_file(records / _PROCESS_FILE, most_bytes=MAX_BYTES, within=within or directory.parent)
        fields = json.loads(content)
        program = Program(**{**fields, "directory": directory, "command": tuple(fields["command"])})
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return program if program.is_sound() else None


def note(records: Path, started: Program) -> None:
    """Keeps it for `noted`."""
    fields = dataclasses.asdict(started)
    del fields["directory"]  # where it lies says that
    write_atomically(records / _PROCESS_FILE, json.dumps(fields))
