"""`harness launch`: files for torchrun, accelerate, Slurm and Kubernetes, as they come or for one run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import NoReturn

from harness.cli.arguments import parser
from harness.cli.errors import reporting
from harness.cli.launch_files import GRACE_S, NUM_GPUS, Job, launch_file, launch_files, render
from harness.cli.output import say
from harness.config import parse_arguments
from harness.errors import LaunchError

__all__ = ["run"]

_SUBMIT = {
    "torchrun": ["bash", "-s"],
    "slurm": ["sbatch"],
    "kubernetes": ["kubectl", "apply", "-f", "-"],
    "kubeflow": ["kubectl", "apply", "-f", "-"],
}
_DESCRIPTION = (
    "List the launch files that come with the package; print one, to be kept in a file and changed; or make "
    "one for a run: harness launch --on slurm --nodes 2 -- CONFIG [--section.key value]..."
)


def run(argv: Sequence[str]) -> int:
    """Lists the launch files, prints one of them, or makes one for a run and prints or submits it."""
    own, program = _split(list(argv))
    arguments = parser("launch", _DESCRIPTION)
    choice = arguments.add_mutually_exclusive_group()
    choice.add_argument("--print", dest="name", choices=launch_files(), help="print this file")
    choice.add_argument("--on", choices=_SUBMIT, help="make this file for the run that is named after `--`")
    arguments.add_argument("--nodes", type=int, default=1, help="machines (default: 1)")
    arguments.add_argument(
        "--processes",
        type=int,
        help=f"processes on each machine (default: one a GPU, of which a node of a cluster has {NUM_GPUS}; "
        "1 with --parallel.device cpu)",
    )
    arguments.add_argument(
        "--grace-s",
        type=int,
        default=GRACE_S,
        metavar="SECONDS",
        help=f"longest that finishing a step and saving may take after a stop (default: {GRACE_S})",
    )
    arguments.add_argument("--submit", action="store_true", help="start it instead of printing it")
    given = arguments.parse_args(own)
    if given.on is None and (program is not None or given.submit):
        arguments.error("--submit and `-- CONFIG` need --on")
    with reporting() as outcome:
        if given.on is not None:
            return _launch(given.on, program or [], given.nodes, given.processes, given.grace_s, given.submit)
        _show(given.name)
    return outcome.exit_code


def _split(argv: list[str]) -> tuple[list[str], list[str] | None]:
    """The command's own arguments, and what stands after `--`."""
    if "--" not in argv:
        return argv, None
    at = argv.index("--")
    return argv[:at], argv[at + 1 :]


def _show(name: str | None) -> None:
    if name is not None:
        sys.stdout.write(launch_file(name))
        return
    for each, path in launch_files().items():
        say(f"{each:<12}{path}")


def _launch(
    on: str, program: list[str], nodes: int, processes: int | None, grace_s: int, submit: bool
) -> int:
    if program and not program[0].startswith("-"):
        program = ["--config", *program]
    config = parse_arguments(program, prog=f"harness launch --on {on} --")
    if processes is None and config.parallel.device == "cpu":
        processes = 1
    elif processes is None and on != "torchrun":
        processes = NUM_GPUS
    job = Job(config, program, nodes, processes, grace_s)
    job.check()
    text = render(job, on=on)
    if not submit:
        sys.stdout.write(text)
        return 0
    return _submit(text, on, nodes)


def _submit(text: str, on: str, nodes: int) -> int:
    command = _SUBMIT[on]
    if on == "torchrun" and nodes > 1:
        raise LaunchError(
            f"torchrun on {nodes} machines cannot be started from one of them",
            rule="every machine starts its own agent",
            remedy="print the file and start it on each machine, with RDZV=HOST:PORT of one of them",
        )
    if shutil.which(command[0]) is None:
        raise LaunchError(
            f"there is no {command[0]} on this machine",
            rule=f"a run is submitted to {on} by `{' '.join(command)}`",
            remedy="leave --submit out, and submit what is printed where there is one",
        )
    if on == "torchrun":
        _become(command, text)
    return subprocess.run(command, input=text, text=True, check=False).returncode


def _become(command: list[str], text: str) -> NoReturn:
    """Turns into the command, which reads `text`: signals then reach the agent, and not this process."""
    with tempfile.TemporaryFile() as script:
        script.write(text.encode())
        script.seek(0)
        os.dup2(script.fileno(), sys.stdin.fileno())
    os.execvp(command[0], command)
