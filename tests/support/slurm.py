"""A Slurm of two nodes, both of them this machine, for jobs of tests: daemons, keys and spool in a folder."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.support.runs import ROOT, wait_for

__all__ = ["NODES", "SCRIPT", "Slurm", "free_ports", "why_not"]

NODES = ("127.0.0.1", "127.0.0.2")
"""Names that are addresses too, so that the job script's host name leads somewhere."""
SCRIPT = ROOT / "harness" / "launch" / "slurm.sbatch"
GRACE_S = 60
"""Of a pre-emption: long for a busy machine; a job that has saved leaves before."""
_NODE_MARK = "HARNESS_TEST_NODE"
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "srun")

_CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# cred_expire: a job that is queued again waits until its old credential is worth nothing (120 s).
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2
SlurmdParameters=config_overrides
SlurmdTimeout=10
MessageTimeout=60
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=64 RealMemory=1000 Gres=gpu:8
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=64 RealMemory=1000 Gres=gpu:8
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace_s} State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
"""


def why_not() -> str | None:
    """Why there can be no Slurm here, or None."""
    missing = [name for name in _PROGRAMS if _which(name) is None]
    if missing:
        return f"Slurm is not installed: no {', '.join(missing)}"
    if os.geteuid():
        return "slurmd is started by root alone"
    return None


@dataclass(frozen=True, slots=True)
class Slurm:
    """A running Slurm."""

    folder: Path
    environment: dict[str, str]
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @classmethod
    @contextlib.contextmanager
    def started(cls, folder: Path) -> Iterator[Slurm]:
        """Starts the daemons with all that they keep in `folder`, and ends them and all that they started."""
        configuration = folder / "slurm.conf"
        environment = {**os.environ, "SLURM_CONF": str(configuration), "SLURM_TIME_FORMAT": "%s"}
        slurm = cls(folder, environment)
        slurm._configure(configuration)
        try:
            slurm._start_munge()
            slurm._start("slurmctld", "-D", "-i")
            for node in NODES:
                slurm.start_node(node)
            wait_for(
                lambda: slurm.run("sinfo", "-h", "-N", "-o%t").split() == ["idle"] * 4, what="two idle nodes"
            )
            yield slurm
        finally:
            _kill(process for process in psutil.process_iter() if slurm._is_ours(process))
            for daemon in slurm.daemons:
                daemon.wait(timeout=30)

    def run(self, *command: str, **environment: str) -> str:
        """What a command of Slurm prints.

        Raises:
            AssertionError: it failed.
        """
        done = subprocess.run(
            command,
            cwd=self.folder,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=120.0,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *command: str, **environment: str) -> str:
        """Queues a script with its options and arguments; the job's number."""
        return self.run("sbatch", "--parsable", "--output=job-%j.out", *command, **environment).strip()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self.run("scontrol", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, number: str) -> str:
        return self.job(number)["JobState"]

    def wait_for_state(self, number: str, *states: str, timeout_s: float = 120.0) -> None:
        """Until the job is in one of the states."""
        wait_for(lambda: self.state(number) in states, timeout_s=timeout_s, what=f"job {number}: {states}")

    def output(self, number: str) -> str:
        return (self.folder / f"job-{number}.out").read_text()

    def start_node(self, node: str) -> None:
        self._start("slurmd", "-D", "-N", node, **{_NODE_MARK: node})

    def fail_node(self, node: str) -> None:
        """Kills all that runs on a node, as a loss of power would."""
        _kill(process for process in psutil.process_iter() if self._is_on(process, node))

    def _configure(self, configuration: Path) -> None:
        text = _CONFIGURATION.format(
            host=socket.gethostname().partition(".")[0],
            user=getpass.getuser(),
            folder=self.folder,
            nodes=NODES,
            ports=free_ports(3),
            grace_s=GRACE_S,
        )
        configuration.write_text(text)
        for number in range(8):
            (self.folder / f"gpu{number}").touch()
        gpus = f"NodeName={','.join(NODES)} Name=gpu File={self.folder}/gpu[0-7]\n"
        (self.folder / "gres.conf").write_text(gpus)

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {
            "key-file": key,
            "socket": "munge.socket",
            "pid-file": "munged.pid",
            "seed-file": "munge.seed",
        }
        options = [f"--{option}={self.folder / name}" for option, name in files.items()]
        self._start("munged", "--foreground", "--force", *options)
        wait_for((self.folder / "munge.socket").exists, what="munged")

    def _start(self, program: str, *options: str, **environment: str) -> None:
        with (self.folder / f"{program}.out").open("ab") as output:
            daemon = subprocess.Popen(
                [_which(program) or program, *options],
                env={**self.environment, **environment},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.daemons.append(daemon)

    def _is_ours(self, process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error):
            if process.name() == "slurmstepd":  # which writes over its environment
                return bool(self._logs_of(process))
            return process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]
        return False

    def _logs_of(self, process: psutil.Process) -> list[str]:
        """The files right in the folder that a process has open."""
        paths = [Path(file.path) for file in process.open_files()]
        return [path.name for path in paths if path.parent == self.folder]

    def _is_on(self, process: psutil.Process, node: str) -> bool:
        with contextlib.suppress(psutil.Error):
            if self._is_ours(process):
                variables = process.environ()
                named = node in (variables.get(_NODE_MARK), variables.get("SLURMD_NODENAME"))
                return named or f"slurmd-{node}.log" in self._logs_of(process)
        return False


def _which(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _kill(processes: Iterator[psutil.Process]) -> None:
    for process in list(processes):
        with contextlib.suppress(psutil.Error):
            process.kill()
