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
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.atomic import write_atomically
from harness.errors import ConfigError
from harness.files import read_file
from harness.locks import locked
from harness.runlog.process import is_alive

__all__ = [
    "OUTPUT_FILE",
    "RECORDS",
    "Program",
    "has_fields_of",
    "lock_records",
    "read_program",
    "records_dir",
    "write_program",
]

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
    """Seconds since the epoch."""
    process_start_s: float | None
    """Seconds since the machine's boot; None in records of older versions."""
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

    def is_running(self) -> bool:
        """Whether it still runs, on this machine."""
        return self.exit_code is None and is_alive(dataclasses.asdict(self)) is True


def records_dir(directory: Path) -> Path:
    """The folder of what is known of a run's program."""
    return directory.parent / RECORDS / directory.name


@contextlib.contextmanager
def lock_records(directory: Path) -> Iterator[Path]:
    """The same folder, made if need be and locked for one at a time.

    Raises:
        ConfigError: nothing can be written there.
    """
    records = records_dir(directory)
    try:
        records.mkdir(parents=True, exist_ok=True)
        lock = contextlib.ExitStack()
        lock.enter_context(locked(records / "lock"))
    except OSError as error:
        raise ConfigError(
            f"cannot write to {records}: {error.strerror}",
            rule="the dashboard keeps what it starts there",
            remedy="make the folder writable, or choose another folder for runs",
        ) from error
    with lock:
        yield records


def read_program(records: Path, directory: Path, *, within: Path | None = None) -> Program | None:
    """What `write_program` wrote last; None if nothing can be read.

    Args:
        records: The folder of what is known of the program.
        directory: The run's directory.
        within: The folder of runs, below which no link is followed; None: the one that holds the run.
    """
    try:
        content = read_file(records / _PROCESS_FILE, most_bytes=MAX_BYTES, within=within or directory.parent)
        fields = json.loads(content)
    except (OSError, ValueError, RecursionError):
        return None
    if isinstance(fields, dict):
        fields.setdefault("process_start_s", None)
    if not has_fields_of(Program, fields, without="directory"):
        return None
    return Program(**{**fields, "directory": directory, "command": tuple(fields["command"])})


def write_program(records: Path, program: Program) -> None:
    """Writes it down for `read_program`."""
    fields = dataclasses.asdict(program)
    del fields["directory"]  # where the file lies says that
    write_atomically(records / _PROCESS_FILE, json.dumps(fields))


def has_fields_of(schema: type, values: Any, *, without: str) -> bool:
    """Whether values from a JSON file, which may be anybody's, are a dataclass's fields and of their types.

    Args:
        schema: The dataclass; its fields are numbers, strings, `Literal`s of strings, tuples of strings and
            unions of these.
        values: What was read.
        without: A field that is left out of the file.
    """
    hints = typing.get_type_hints(schema)
    del hints[without]
    return (
        isinstance(values, dict)
        and values.keys() == hints.keys()
        and all(_has_type(value, hints[name]) for name, value in values.items())
    )


def _has_type(value: Any, hint: Any) -> bool:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return any(_has_type(value, part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    if hint == tuple[str, ...]:
        return isinstance(value, list) and all(isinstance(part, str) for part in value)
    if hint is float:
        return type(value) in (float, int) or value in ("nan", "inf", "-inf")  # see `tracking.text.spelled`
    return type(value) is hint
