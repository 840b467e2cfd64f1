"""The launch files that come with the package, and what is changed in them for one run.

A file runs as it is; its own values are the places where others are put. So there is one text to read.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.config import TrainConfig
from harness.config.keys import flatten
from harness.config.load import read_yaml
from harness.config.presets import configuration_file, preset_names
from harness.errors import LaunchError

__all__ = ["GRACE_S", "NUM_GPUS", "Job", "launch_file", "launch_files", "render"]

_FOLDER = Path(__file__).parents[1] / "launch"
GRACE_S = 120
"""How long a stop may take, in all files."""
_AGENT_GRACE_S = 10
"""How much earlier torchrun kills, so that it is gone itself when its own launcher kills."""
NUM_GPUS = 8
"""Of a node, in the files of clusters."""
_LONGEST_NAME = 50
"""Of a Kubernetes object whose pods have longer ones, of 63 characters at most."""


@dataclass(frozen=True, slots=True)
class Job:
    """A run that is to be started on some machines."""

    config: TrainConfig
    arguments: Sequence[str]
    """Of the program."""
    nodes: int
    processes: int | None
    """On each node; None: one for each GPU, as many as the file says."""
    grace_s: int

    @property
    def name(self) -> str:
        """The run's name, as schedulers allow it."""
        allowed = re.sub(r"[^a-z0-9]+", "-", self.config.name.lower()).strip("-")[:_LONGEST_NAME].rstrip("-")
        return allowed or "harness"

    @property
    def object_name(self) -> str:
        """The run's name, as Kubernetes allows it for a service: it begins with a letter."""
        return self.name if self.name[0].isalpha() else f"run-{self.name}"

    @property
    def on_cpu(self) -> bool:
        return self.config.parallel.device == "cpu"

    @property
    def agent_grace_s(self) -> int:
        return self.grace_s - _AGENT_GRACE_S

    def check(self) -> None:
        """Checks what can be said before anything has started.

        Raises:
            LaunchError: a number that cannot be.
            ConfigError: the run cannot be split over so many processes.
        """
        least_grace_s = 2 * _AGENT_GRACE_S
        numbers = {
            "--nodes": (self.nodes, 1),
            "--processes": (self.processes, 1),
            "--grace-s": (self.grace_s, least_grace_s),
        }
        for option, (value, least) in numbers.items():
            if value is not None and value < least:
                raise LaunchError(f"{option} is {value}", rule=f"it has to be {least} or more")
        if self.processes is not None:
            self.config.check_world(self.nodes * self.processes)


def launch_files() -> dict[str, Path]:
    """The files by their names."""
    return {path.stem: path for path in sorted(_FOLDER.iterdir()) if path.is_file()}


def launch_file(name: str) -> str:
    return launch_files()[name].read_text(encoding="utf-8")


def render(job: Job, *, on: str) -> str:
    """The file `on` for this job: one of torchrun, slurm, kubernetes, kubeflow.

    Raises:
        ConfigError: the run's configuration file cannot be read.
    """
    changes = {"torchrun": _torchrun, "slurm": _slurm, "kubernetes": _kubernetes, "kubeflow": _kubeflow}[on]
    return _changed(launch_file(on), changes(job))


def _changed(text: str, changes: Mapping[str, str]) -> str:
    for old, new in changes.items():
        if old not in text:
            raise AssertionError(f"the launch file does not say {old!r}")
        text = text.replace(old, new)
    return text


def _torchrun(job: Job) -> dict[str, str]:
    rdzv = "RDZV=${RDZV:-localhost:0}" if job.nodes == 1 else "RDZV=${RDZV:?host:port of one of the machines}"
    return {
        "#   harness launch --print torchrun > torchrun.sh; bash torchrun.sh --config gpt2_124m\n": "",
        "${NNODES:-1}": f"${{NNODES:-{job.nodes}}}",
        "${NPROC:-gpu}": f"${{NPROC:-{_processes_or_gpus(job)}}}",
        "RDZV=${RDZV:-localhost:0}": rdzv,
        "${SHUTDOWN_S:-110}": f"${{SHUTDOWN_S:-{job.agent_grace_s}}}",
        "${RUN_ID:-harness}": f"${{RUN_ID:-{job.name}}}",
        '"$@"': f'{shlex.join(job.arguments)} "$@"',
    }


def _slurm(job: Job) -> dict[str, str]:
    gpus = "" if job.on_cpu else f"#SBATCH --gpus-per-node={job.processes or NUM_GPUS}\n"
    return {
        "# harness launch --print slurm > slurm.sbatch; sbatch slurm.sbatch --config llama_1b\n#\n": "",
        "120 s before": f"{job.grace_s} s before",
        "--job-name=harness": f"--job-name={job.name}",
        "--nodes=2": f"--nodes={job.nodes}",
        "#SBATCH --gpus-per-node=8\n": gpus,
        "#SBATCH --cpus-per-task=64\n": f"#SBATCH --cpus-per-task={job.processes}\n"
        if job.on_cpu
        else "#SBATCH --cpus-per-task=64\n",
        "TERM@120": f"TERM@{job.grace_s}",
        "the 120 s": f"the {job.grace_s} s",
        "TIMEOUT=110": f"TIMEOUT={job.agent_grace_s}",
        "--wait=120": f"--wait={job.grace_s}",
        "${NPROC:-gpu}": f"${{NPROC:-{_processes_or_gpus(job)}}}",
        '"$@"': f'{shlex.join(job.arguments)} "$@"',
    }


def _kubernetes(job: Job) -> dict[str, str]:
    name, quoted = job.object_name, json.dumps(job.object_name)  # `on` is no text in YAML
    return {
        "# harness launch --print kubernetes | kubectl apply -f -\n#\n": "",
        "name: harness\n": f"name: {quoted}\n",
        "job-name: harness": f"job-name: {quoted}",
        "subdomain: harness": f"subdomain: {quoted}",
        "harness-0.harness": f"{name}-0.{name}",
        "--rdzv-id=harness": f"--rdzv-id={name}",
        "completions: 2": f"completions: {job.nodes}",
        "parallelism: 2": f"parallelism: {job.nodes}",
        "--nnodes=2": f"--nnodes={job.nodes}",
        "--nproc-per-node=8": f"--nproc-per-node={job.processes or NUM_GPUS}",
        "          resources:\n            limits: {nvidia.com/gpu: 8}\n": _limits(
            job, indent=10, title="resources"
        ),
        **_in_container(job, indent=12),
    }


def _kubeflow(job: Job) -> dict[str, str]:
    name, quoted = job.object_name, json.dumps(job.object_name)  # `on` is no text in YAML
    return {
        "# harness launch --print kubeflow | kubectl apply -f -\n#\n": "",
        "trainjob harness ": f"trainjob {name} ",
        "name: harness\n": f"name: {quoted}\n",
        "name: harness}": f"name: {quoted}}}",
        "--rdzv-id=harness": f"--rdzv-id={name}",
        "numNodes: 2": f"numNodes: {job.nodes}",
        "numProcPerNode: 8": f"numProcPerNode: {job.processes or NUM_GPUS}",
        "    resourcesPerNode:\n      limits: {nvidia.com/gpu: 8}\n": _limits(
            job, indent=4, title="resourcesPerNode"
        ),
        **_in_container(job, indent=6),
    }


def _in_container(job: Job, *, indent: int) -> dict[str, str]:
    """What both kinds of Kubernetes job have in common."""
    runs = job.config.runs_dir if Path(job.config.runs_dir).is_absolute() else "/runs"
    program = [*_self_contained(job.arguments), f"--runs_dir={runs}"]
    lines = "".join(f"{' ' * indent}- {json.dumps(argument)}\n" for argument in program)
    old = "".join(f"{' ' * indent}- {argument}\n" for argument in ("--runs_dir=/runs", "--config=llama_1b"))
    return {
        "PeriodSeconds: 120": f"PeriodSeconds: {job.grace_s}",
        'value: "110"': f'value: "{job.agent_grace_s}"',
        "mountPath: /runs}": f"mountPath: {json.dumps(runs)}}}",
        old: lines,
    }


def _limits(job: Job, *, indent: int, title: str) -> str:
    if job.on_cpu:
        return ""
    return (
        f"{' ' * indent}{title}:\n{' ' * indent}  limits: {{nvidia.com/gpu: {job.processes or NUM_GPUS}}}\n"
    )


def _processes_or_gpus(job: Job) -> int | str:
    return "gpu" if job.processes is None else job.processes


def _self_contained(arguments: Sequence[str]) -> list[str]:
    """The arguments with those of a configuration file in its place: a container does not have the file."""
    found: list[str] = []
    given = iter(arguments)
    for argument in given:
        name, is_joined, value = argument.partition("=")
        if name != "--config":
            found.append(argument)
            continue
        value = value if is_joined else next(given)
        found += [f"--config={value}"] if value in preset_names() else _settings(configuration_file(value))
    return found


def _settings(file: Path) -> list[str]:
    return [f"--{key}={_as_argument(value)}" for key, value in flatten(read_yaml(file)).items()]


def _as_argument(value: Any) -> str:
    """A value of YAML as an argument: JSON, which YAML reads, but for a text, which stands for itself."""
    return value if isinstance(value, str) else json.dumps(value)
