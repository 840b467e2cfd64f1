"""Runs as programs of their own: started, stopped, resumed, and what they print.

A program that was started here is the leader of a session of its own, reads nothing, and prints into a file,
so it keeps running when the dashboard ends. What is known of it is in `records`.

`within` is everywhere the folder of runs, below which no link is followed; None: the one that holds the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from harness.atomic import write_atomically
from harness.config import TrainConfig, check_same_run, flatten, read_yaml
from harness.dashboard.form import read, yaml_of
from harness.dashboard.output import read_output
from harness.dashboard.records import (
    OUTPUT_FILE,
    RECORDS,
    Program,
    lock_records,
    read_program,
    records_dir,
    write_program,
)
from harness.env import program_environment
from harness.errors import ConfigError, LaunchError, TrackingError
from harness.files import list_folder
from harness.runlog.paths import CONFIG_FILE, config_file
from harness.runlog.preview import open_digest
from harness.runlog.process import identity, is_alive, started_at
from harness.runlog.reader import is_run

__all__ = [
    "PROGRAM",
    "check_processes",
    "configuration",
    "kill",
    "last_processes",
    "output",
    "program",
    "programs",
    "resume",
    "run_directory",
    "start",
    "stop",
]

PROGRAM = Path(__file__).resolve().parents[1] / "train.py"


def start(
    config: TrainConfig, *, runs_dir: Path | str, processes: int = 1, within: Path | None = None
) -> Program:
    """Starts the run that `config` describes, below `runs_dir` whatever its own `runs_dir` is.

    Args:
        processes: One is started as it is, several by torchrun, all on this machine.

    Raises:
        ConfigError: the name leads out of the folder, the batch cannot be split over so many processes, or
            the run exists with other settings.
        TrackingError: the run is running.
        LaunchError: no program can be started.
    """
    directory = run_directory(runs_dir, config.name)
    within = within or Path(runs_dir).resolve()
    config = dataclasses.replace(config, runs_dir=str(directory.parent))
    check_processes(config, processes)
    with lock_records(directory) as records:
        _check_not_running(directory, records, within)
        if config_file(directory).exists():
            check_same_run(config, config_file(directory), within=within)
        return _launch(records, directory, config, processes)


def resume(
    run_dir: Path | str,
    *,
    processes: int | None = None,
    steps: int | None = None,
    within: Path | None = None,
) -> Program:
    """Resumes a run from its newest checkpoint, with the configuration in its directory.

    Args:
        processes: As for `start`; None: as many as last time.
        steps: A new `loop.steps`.

    Raises:
        ConfigError, TrackingError, LaunchError: as for `start`; or there is no run.
    """
    directory = Path(run_dir).resolve()
    config = dataclasses.replace(configuration(directory, within=within), name=directory.name, resume="must")
    if steps is not None:
        config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, steps=steps))
    if processes is None:
        processes = last_processes(directory, within=within)
    return start(config, runs_dir=directory.parent, processes=processes, within=within)


def stop(run_dir: Path | str, *, within: Path | None = None) -> None:
    """Asks a run to finish its step, save a checkpoint and exit; returns at once.

    Rank 0 is asked, wherever the run was started on this machine, and tells the others. torchrun's agent is
    not: it would wait half a minute for its workers and kill them. An agent that someone else has started
    with `--max-restarts` will restart them.

    Raises:
        TrackingError: the run is not running, or not on this machine.
    """
    directory = Path(run_dir).resolve()
    started, last = program(directory, within=within), _last_attempt(directory, within)
    if not last.ended and is_alive(last.info):
        _signal(directory, int(last.info["pid"]), signal.SIGTERM)
    elif started is not None and started.is_running() and not _is_ending(started, last):
        _signal(directory, started.pid, signal.SIGTERM)  # it is still starting: there is nothing to save
    else:
        raise _not_running(directory, last)


def kill(run_dir: Path | str, *, within: Path | None = None) -> None:
    """Ends a run that was started here at once, by SIGKILL; what came after its last checkpoint is lost.

    Its side process is left to complete the mirrors.

    Raises:
        TrackingError: it is not running, or was not started here.
    """
    directory = Path(run_dir).resolve()
    started = program(directory, within=within)
    if started is None or not started.is_running():
        raise TrackingError(
            f"there is no program of {directory} to kill",
            rule="only what was started here and is still running can be killed",
            remedy="`stop` asks any run on this machine to end",
        )
    for group in _groups(started):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def program(run_dir: Path | str, *, within: Path | None = None) -> Program | None:
    """The program of a run that was last started here, or None."""
    directory = Path(run_dir).resolve()
    return read_program(records_dir(directory), directory, within=within)


def programs(runs_dir: Path | str) -> list[Program]:
    """All that was started in a folder of runs, newest first; those too that ended before they were runs."""
    root = Path(runs_dir).resolve()
    names = list_folder(root / RECORDS, within=root).folders
    found = [read_program(root / RECORDS / name, root / name, within=root) for name in names]
    return sorted((one for one in found if one is not None), key=lambda one: -one.started)


def output(runs_dir: Path | str, run: str, offset: int = 0) -> tuple[str, int]:
    """What the run has printed from `offset` on, and the next offset; no text if it was not started here.

    Raises:
        ConfigError: `run` leads out of the folder.
    """
    records = records_dir(run_directory(runs_dir, run))
    return read_output(records / OUTPUT_FILE, offset, within=Path(runs_dir).resolve())


def configuration(run_dir: Path | str, *, within: Path | None = None) -> TrainConfig:
    """The configuration that a run keeps in its directory.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    directory = Path(run_dir)
    return read(flatten(read_yaml(config_file(directory), within=within or directory.parent)))


def run_directory(runs_dir: Path | str, run: str) -> Path:
    """Where the run of that name, or path below the folder, has its directory.

    Raises:
        ConfigError: it is not below the folder, or can be no folder's name.
    """
    root = Path(runs_dir).resolve()
    directory = root / run
    try:
        is_below = directory.resolve() == directory and directory != root and directory.is_relative_to(root)
        directory.is_dir()  # refuses what is too long
    except (OSError, ValueError):
        is_below = False
    if not is_below or RECORDS in directory.relative_to(root).parts:
        raise ConfigError(
            f"the run's name is {run[:200]!r}",
            rule=f"it is a folder below {root}, without links on the way",
            remedy="choose another name",
        )
    return directory


def check_processes(config: TrainConfig, processes: int) -> None:
    """Checks that the run can be spread over so many.

    Raises:
        ConfigError: it cannot.
    """
    if processes < 1:
        raise ConfigError(f"the number of processes is {processes}", rule="it has to be 1 or more")
    config.check_world(processes)


def last_processes(run_dir: Path | str, *, within: Path | None = None) -> int:
    """How many processes the run last had, as its log says; 1 if it does not."""
    return int(_last_attempt(Path(run_dir).resolve(), within).info.get("world_size", 1))


def _launch(records: Path, directory: Path, config: TrainConfig, processes: int) -> Program:
    file = records / CONFIG_FILE
    write_atomically(file, yaml_of(config))
    command = [*_launcher(processes), str(PROGRAM), "--config", str(file)]
    try:
        with open(records / OUTPUT_FILE, "ab") as printed:
            printed.write(f"\n$ {shlex.join(command)}\n".encode(errors="replace"))
            printed.flush()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=program_environment(PYTHONUNBUFFERED="1"),
            )
        return _recorded(process, command, records, directory, processes)
    except (OSError, RuntimeError) as error:  # RuntimeError: no more threads
        raise LaunchError(
            f"the run {config.name!r} cannot be started: {getattr(error, 'strerror', None) or error}",
            rule="a run is a process of its own that prints into a file",
            remedy=f"check that {records} can be written, and the limits on memory and processes",
        ) from error


def _recorded(
    process: subprocess.Popen[bytes], command: list[str], records: Path, directory: Path, processes: int
) -> Program:
    """Writes down what was just started, and has it waited for; ends it if either cannot be done."""
    try:
        here = identity()
        started = Program(
            directory=directory,
            command=tuple(command),
            processes=processes,
            pid=process.pid,
            process_start=psutil.Process(process.pid).create_time(),
            process_start_s=started_at(process.pid),
            machine=here["machine"],
            host=here["host"],
            started=time.time(),
        )
        write_program(records, started)
        threading.Thread(
            target=_wait_for_end, args=(process, started), name="wait for a run", daemon=True
        ).start()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    return started


def _launcher(processes: int) -> list[str]:
    if processes == 1:
        return [sys.executable]
    # -P: modules in the working folder must not shadow the launcher's.
    torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, "--nproc-per-node", str(processes), "--max-restarts", "0"]


def _wait_for_end(process: subprocess.Popen[bytes], started: Program) -> None:
    """Leaves no zombie, and records the exit code unless the run has been started again."""
    exit_code = process.wait()
    with contextlib.suppress(ConfigError, OSError), lock_records(started.directory) as records:
        if read_program(records, started.directory) == started:
            write_program(records, dataclasses.replace(started, exit_code=exit_code))
            _print_signal(records, exit_code)


def _print_signal(records: Path, exit_code: int) -> None:
    """A process that a signal has ended could not print that itself, and readers would wait for more."""
    if exit_code < 0:
        with open(records / OUTPUT_FILE, "ab") as printed:
            printed.write(f"\n[ended by {signal.strsignal(-exit_code)}, signal {-exit_code}]\n".encode())


def _check_not_running(directory: Path, records: Path, within: Path) -> None:
    started, last = read_program(records, directory, within=within), _last_attempt(directory, within)
    if (started is not None and started.is_running()) or is_alive(last.info) or last.runs_elsewhere:
        raise TrackingError(
            f"{directory} is running, on {last.info.get('host', 'this machine')}",
            rule="a run has one writer",
            remedy="stop it and wait until it has ended, or choose another name",
        )


def _not_running(directory: Path, last: _Attempt) -> TrackingError:
    if last.runs_elsewhere:
        return TrackingError(
            f"{directory} is running on {last.info.get('host')}",
            rule="a run is stopped on the machine of its rank 0",
            remedy=f"there, `kill -TERM {last.info.get('pid')}` stops it",
        )
    return TrackingError(f"{directory} is not running", rule="only a run that is running can be stopped")


@dataclasses.dataclass(frozen=True, slots=True)
class _Attempt:
    """What the run's log says of the newest attempt, wherever it was started."""

    info: Mapping[str, Any]
    """Of its rank 0; empty without a log."""
    ended: bool
    runs_elsewhere: bool
    """On another machine, as far as is known."""
    updated: float = 0.0
    """Time of its last record, in seconds since the epoch."""


def _last_attempt(directory: Path, within: Path | None) -> _Attempt:
    within = within or directory.parent
    if not is_run(directory, within=within):
        return _Attempt({}, ended=True, runs_elsewhere=False)
    # A preview of a long log has both ends of it, which is where this stands.
    log = open_digest(directory, within=within)
    elsewhere = is_alive(log.info) is None and log.state() == "running"
    return _Attempt(log.info, ended=log.end is not None, runs_elsewhere=elsewhere, updated=log.updated or 0.0)


def _is_ending(started: Program, last: _Attempt) -> bool:
    """Whether the attempt that this program made has written its end: what lives is about to leave."""
    return last.ended and last.updated > started.started


def _signal(directory: Path, pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError as error:
        raise TrackingError(
            f"{directory} has just ended", rule="only a run that is running can be stopped"
        ) from error
    except PermissionError as error:
        raise TrackingError(
            f"{directory} is run by another user, as process {pid}",
            rule="only the user who started a process can stop it",
        ) from error


def _groups(started: Program) -> list[int]:
    """The process groups of a program: torchrun gives every worker one of its own."""
    if started.processes == 1:
        return [started.pid]
    with contextlib.suppress(psutil.NoSuchProcess):
        agent = psutil.Process(started.pid)
        agent.suspend()  # or it might start another worker meanwhile
        return [started.pid, *(child.pid for child in agent.children() if os.getpgid(child.pid) == child.pid)]
    return [started.pid]
