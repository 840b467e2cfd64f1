"""The only module that reads the environment. Everything else is told."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from harness.errors import LaunchError

__all__ = [
    "Launched",
    "accelerate_precision",
    "cache_dir",
    "child_environment",
    "compiler",
    "dashboard_token",
    "exit_note",
    "has_launcher",
    "has_wandb_key",
    "is_direct_child",
    "is_restartable",
    "is_restartable_on_several",
    "is_terminal",
    "launched",
    "nccl_ras_address",
    "program_environment",
    "rendezvous_address",
    "rendezvous_settings",
    "restarts_left",
    "set_default",
    "set_exit_note",
    "shares_agent_store",
    "store_address",
    "threads_are_set",
    "threads_are_users",
    "train_job_endpoint",
    "unheard_launcher",
    "wandb_address",
    "wants_native",
    "wants_traceback",
]

_SAID_BY_LAUNCHERS = {
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME",
    "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE",
    "MASTER_ADDR", "MASTER_PORT", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS",
}  # fmt: skip
_LAUNCHERS_PREFIXES = ("TORCHELASTIC_", "PET_", "ACCELERATE_")
_EXIT_NOTE = "HARNESS_EXIT_NOTE"
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class Launched:
    """What the launcher says about this process. Without a launcher: one process, rank 0 of 1."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    by_launcher: bool = False
    """RANK and WORLD_SIZE were set, so a rendezvous is expected even for one process."""
    on_cpu: bool = False
    """accelerate was told `use_cpu`."""
    main_address: str = ""
    """Of the machine with rank 0: MASTER_ADDR."""

    @property
    def on_several_machines(self) -> bool:
        """Whether some of the processes run elsewhere."""
        return self.local_world_size < self.world_size


@dataclass(frozen=True, slots=True)
class TrainJobEndpoint:
    """Where Kubeflow Trainer takes reports of a TrainJob's progress."""

    url: str
    token_file: str
    authority_file: str | None
    """Certificate of who signed the endpoint's; None: one of those that the system trusts."""


def has_rank() -> bool:
    """Whether a launcher has told this process its rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def has_launcher() -> bool:
    """Whether a launcher started this process. accelerate tells a single process no rank."""
    return has_rank() or is_direct_child()


def is_direct_child() -> bool:
    """Whether it was torchrun or `accelerate launch`, whose children have variables that nobody else sets."""
    by_accelerate = {"ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND"}
    return "TORCHELASTIC_RUN_ID" in os.environ or by_accelerate <= os.environ.keys()


def restarts_left() -> bool:
    """Whether torchrun's agent would start the program again if it failed."""
    return _int("TORCHELASTIC_RESTART_COUNT", 0) < _int("TORCHELASTIC_MAX_RESTARTS", 0)


def is_restartable() -> bool:
    """Whether torchrun's agent starts the program again."""
    return _int("TORCHELASTIC_MAX_RESTARTS", 0) > 0


def is_restartable_on_several() -> bool:
    """Whether torchrun's agents of several machines start the program again."""
    return is_restartable() and _int("GROUP_WORLD_SIZE", 1) > 1


def shares_agent_store() -> bool:
    """Whether these agents keep one store for all attempts."""
    return os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1"


def rendezvous_settings() -> str:
    """What torchrun's --rdzv-conf is where the environment says it."""
    return os.environ.get("PET_RDZV_CONF", "")


def launched() -> Launched:
    """Reads the variables that torchrun, `accelerate launch` and Slurm wrappers set.

    Raises:
        LaunchError: a variable is not a whole number.
    """
    by_launcher = has_rank()
    return Launched(
        rank=_int("RANK", 0) if by_launcher else 0,
        local_rank=_int("LOCAL_RANK", 0) if by_launcher else 0,
        world_size=_int("WORLD_SIZE", 1) if by_launcher else 1,
        local_world_size=_int("LOCAL_WORLD_SIZE", 1) if by_launcher else 1,
        by_launcher=by_launcher,
        on_cpu=_flag("ACCELERATE_USE_CPU"),
        main_address=os.environ.get("MASTER_ADDR", ""),
    )


def store_address() -> tuple[str, int] | None:
    """Where another process keeps the store through which the ranks meet; None if this one does, or nobody
    says where.

    Raises:
        LaunchError: the port is not a whole number.
    """
    host, port = os.environ.get("MASTER_ADDR"), _int("MASTER_PORT", 0)
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    return (host, port) if host and port and (by_agent or _int("RANK", 0) > 0) else None


def nccl_ras_address() -> tuple[str, int]:
    """Where NCCL answers questions about a job: NCCL_RAS_ADDR, `host:port` or `[IPv6]:port`."""
    host, _, port = os.environ.get("NCCL_RAS_ADDR", "").rpartition(":")
    if not host or not port.isdigit():
        return "localhost", 28028
    return host.strip("[]"), int(port)


def unheard_launcher() -> tuple[str, int] | None:
    """A variable by which MPI or srun says that there are several processes, and how many it says.

    Where RANK and WORLD_SIZE are missing beside it, each of them would take itself for the only one.

    Raises:
        LaunchError: a variable is not a whole number.
    """
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"):
        if _int(name, 1) > 1:
            return name, _int(name, 1)
    return None


def train_job_endpoint() -> TrainJobEndpoint | None:
    """What Kubeflow Trainer says to the pods of a TrainJob, where its feature gate TrainJobStatus is on."""
    url = os.environ.get("KUBEFLOW_TRAINER_SERVER_URL")
    token_file = os.environ.get("KUBEFLOW_TRAINER_SERVER_TOKEN")
    if not url or not token_file:
        return None
    return TrainJobEndpoint(url, token_file, os.environ.get("KUBEFLOW_TRAINER_SERVER_CA_CERT"))


def rendezvous_address() -> str | None:
    """HOST:PORT at which the launcher has the processes meet, or None without a launcher."""
    if not has_rank() or "MASTER_ADDR" not in os.environ:
        return None
    return f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', '')}"


def accelerate_precision() -> str | None:
    """`no`, `bf16`, `fp16` as given in accelerate's configuration, or None without accelerate."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION")


def cache_dir() -> Path:
    """Where prepared data is kept between runs: `$HARNESS_CACHE`, else the user's cache directory."""
    own = os.environ.get("HARNESS_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stability-harness"


def compiler() -> str | None:
    """Full path of the C++ compiler: `$CXX`, else what is found; None if there is none."""
    wanted = os.environ.get("CXX")
    found = (shutil.which(name) for name in ((wanted,) if wanted else ("c++", "g++", "clang++")))
    return next(filter(None, found), None)


def wants_native() -> bool:
    """`HARNESS_NATIVE=0`: nothing is compiled, and gradients on the CPU are measured by torch."""
    return os.environ.get("HARNESS_NATIVE") != "0"


def interprets_triton() -> bool:
    """Whether Triton's kernels are interpreted, on the CPU."""
    return _flag("TRITON_INTERPRET")


def threads_are_set() -> bool:
    """Whether OMP_NUM_THREADS or MKL_NUM_THREADS is set, by whomever."""
    return any(name in os.environ for name in _THREADS)


def threads_are_users() -> bool:
    """Whether the user has set the number of threads, rather than a launcher.

    torchrun and `accelerate launch` set OMP_NUM_THREADS=1 where it is not set. The environment that the
    launcher itself was started with tells whether it was; where that cannot be read, a 1 under a launcher is
    taken for the launcher's.
    """
    told_by_launcher = any(
        name in _SAID_BY_LAUNCHERS or name.startswith(_LAUNCHERS_PREFIXES) for name in os.environ
    )
    if not told_by_launcher or os.environ.get("OMP_NUM_THREADS") != "1":
        return threads_are_set()
    try:
        started_with = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return "MKL_NUM_THREADS" in os.environ
    return any(entry.startswith(tuple(f"{name}=".encode() for name in _THREADS)) for entry in started_with)


def wants_traceback() -> bool:
    """`HARNESS_TRACEBACK=1`: the command line shows tracebacks of user errors too."""
    return _flag("HARNESS_TRACEBACK")


def dashboard_token() -> str | None:
    """`HARNESS_DASHBOARD_TOKEN`: unlike an argument, no other user of the machine can read it."""
    return os.environ.get("HARNESS_DASHBOARD_TOKEN")


def has_wandb_key() -> bool:
    """Whether WANDB_API_KEY is set."""
    return bool(os.environ.get("WANDB_API_KEY"))


def wandb_address() -> str:
    """Where W&B is, as wandb itself would have it."""
    return os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"


def exit_note() -> Path | None:
    """Where `harness.agent` looks for the program's exit code; None under other launchers."""
    path = os.environ.get(_EXIT_NOTE)
    return Path(path) if path else None


def set_exit_note(path: Path) -> None:
    """Tells the processes that this one starts where to leave their exit code."""
    os.environ[_EXIT_NOTE] = str(path)


def set_default(name: str, value: str) -> None:
    """Sets a variable for libraries and child processes unless the user has set it."""
    os.environ.setdefault(name, value)


def child_environment(defaults: Mapping[str, str] | None = None, /, **changes: str) -> dict[str, str]:
    """This process's environment with some variables changed, for a process that it starts.

    Args:
        defaults: Variables that are set where this process has them not.
        **changes: Variables that are set in any case.

    wandb's mark of a service that this process runs for itself is left out: a child that took it up would
    share its runs, and find its own run's name in use.
    """
    own = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    return {**(defaults or {}), **own, **changes}


def program_environment(**changes: str) -> dict[str, str]:
    """`child_environment` for a run of its own: without what a launcher has told this process about its."""
    return {
        name: value
        for name, value in child_environment(**changes).items()
        if name not in _SAID_BY_LAUNCHERS and not name.startswith(_LAUNCHERS_PREFIXES)
    }


def _int(name: str, default: int) -> int:
    value = os.environ.get(name)
    try:
        return default if value is None else int(value)
    except ValueError:
        raise LaunchError(
            f"{name} is {value!r}",
            rule="a launcher sets it to a whole number",
            remedy=f"unset {name} to start one process without a launcher, or look at what sets it",
        ) from None


def _flag(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() in {"1", "true", "yes", "on"}


def is_terminal() -> bool:
    """Whether standard error is a terminal that a progress bar can be drawn on."""
    return sys.stderr.isatty()
