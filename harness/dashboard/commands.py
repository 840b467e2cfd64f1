"""The command that starts a run elsewhere: to be copied, never run by the dashboard."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import Literal

from harness.config import TrainConfig
from harness.dashboard.form import arguments
from harness.dashboard.programs import PROGRAM, check_processes
from harness.errors import ConfigError

__all__ = ["HEAD_NODE", "NODE_RANK", "Launcher", "command"]

Launcher = Literal["python", "torchrun", "accelerate", "slurm"]

HEAD_NODE = "HEAD_NODE"
"""Stands for the name of the first of several nodes."""
NODE_RANK = "NODE_RANK"
"""Stands for the number, from 0, of the node that accelerate is started on."""
_PORT = 29500
_SBATCH = PROGRAM.with_name("launch") / "slurm.sbatch"
_MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def command(
    config: TrainConfig,
    launcher: Launcher,
    *,
    processes: int = 1,
    nodes: int = 1,
    config_file: Path | str | None = None,
) -> str:
    """The command for a shell. On several nodes it is given on each of them, except with Slurm.

    Args:
        processes: On each node.
        config_file: Holds `config`, and is named; else every setting that differs from its default is.

    Raises:
        ConfigError: the batch cannot be split over so many processes, or the launcher cannot start them.
    """
    check_processes(config, processes * nodes)
    run = [
        _as_seen(PROGRAM),
        *(["--config", str(config_file)] if config_file is not None else arguments(config)),
    ]
    if launcher == "slurm":
        return _slurm(run[1:], processes, nodes)
    if launcher == "python":
        if processes * nodes > 1:
            raise ConfigError(
                f"{processes * nodes} processes without a launcher",
                rule="python alone starts one process",
                remedy="choose torchrun or accelerate",
            )
        return shlex.join([_tool("python"), *run])
    launch = (
        _torchrun(config, processes, nodes)
        if launcher == "torchrun"
        else _accelerate(config, processes, nodes)
    )
    return shlex.join([*launch, *run])


def _torchrun(config: TrainConfig, processes: int, nodes: int) -> list[str]:
    if nodes == 1:
        return [_tool("torchrun"), "--standalone", "--nproc-per-node", str(processes)]
    meeting = [
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"{HEAD_NODE}:{_PORT}",
        f"--rdzv-id={config.name}",
    ]
    return [_tool("torchrun"), "--nnodes", str(nodes), "--nproc-per-node", str(processes), *meeting]


def _accelerate(config: TrainConfig, processes: int, nodes: int) -> list[str]:
    launch = [_tool("accelerate"), "launch", "--num_processes", str(processes * nodes)]
    launch += ["--num_machines", str(nodes), "--dynamo_backend", "no"]
    launch += ["--mixed_precision", _mixed_precision(config)]
    if processes * nodes > 1:
        launch.append("--multi_gpu")  # which is gloo on CPUs too
    if nodes > 1:
        launch += ["--machine_rank", NODE_RANK, "--main_process_ip", HEAD_NODE]
    return [*launch, "--main_process_port", str(_PORT if nodes > 1 else 0)]


def _mixed_precision(config: TrainConfig) -> str:
    """The value that accelerate needs, which it then passes on to the run."""
    if config.loop.precision == "auto":
        return "no" if config.parallel.device == "cpu" else "bf16"
    return _MIXED_PRECISION[config.loop.precision]


def _slurm(run: list[str], processes: int, nodes: int) -> str:
    job = ["sbatch", "--nodes", str(nodes), "--gpus-per-node", str(processes), _as_seen(_SBATCH), *run]
    return f"NPROC={processes} {shlex.join(job)}"


def _as_seen(file: Path) -> str:
    """The path from the working directory, if the file is below that."""
    return str(file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file)


def _tool(name: str) -> str:
    """A command by its name where that finds the one beside this Python, else by its path."""
    own = Path(sys.executable).with_name(name)
    return name if shutil.which(name) == str(own) or not own.exists() else str(own)
