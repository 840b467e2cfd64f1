"""How many threads this process computes with on the CPU.

torchrun and accelerate set OMP_NUM_THREADS=1 for every process where the user set nothing, which leaves all cores
but one idle on a machine without GPUs; and without a launcher torch takes all cores of the host in a container
that may use two. Both are put right at run time, before the first computation.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from harness import env

__all__ = ["use_threads"]

_CGROUPS = Path("/sys/fs/cgroup")


def use_threads(wanted: int, *, local_world_size: int) -> str:
    """Sets torch's number of threads; tells in a line what it is and why.

    Args:
        wanted: `parallel.threads`; 0: this process's share of the cores, unless the user has set OMP_NUM_THREADS
            or called `torch.set_num_threads`.
        local_world_size: Processes of this run on this machine.
    """
    if wanted:
        torch.set_num_threads(wanted)
        return f"{wanted} threads per process, as parallel.threads says"
    if env.threads_are_users():
        return f"{torch.get_num_threads()} threads per process, as OMP_NUM_THREADS says"
    share = _share(local_world_size)
    if not env.threads_are_set():
        share = min(share, torch.get_num_threads())
    torch.set_num_threads(share)
    return f"{share} threads per process: {_cores(os.getppid())} cores for {local_world_size} on this machine"


def _share(local_world_size: int) -> int:
    """The cores for one of so many processes, at least 1.

    A launcher that binds each process to cores of its own has divided them already: then this one's affinity is
    less than the launcher's, and is the share. A launcher that is itself held to fewer cores says nothing.
    """
    own, launchers = _cores(os.getpid()), _cores(os.getppid())
    return max(1, min(own, max(own, launchers) // local_world_size))


def _cores(pid: int) -> int:
    """The cores that a process may use: its affinity, or its control group's quota if that is less."""
    try:
        cores = len(os.sched_getaffinity(pid))
    except (AttributeError, OSError):  # not Linux, or another user's process
        cores = os.cpu_count() or 1
    try:
        membership = Path("/proc/self/cgroup").read_text(encoding="utf-8")
    except OSError:
        return cores
    return max(1, int(min(cores, _quota(membership, _CGROUPS))))


def _quota(membership: str, root: Path) -> float:
    """Cores' worth of time that the control groups in `membership` (/proc/self/cgroup) grant; infinite: no limit.

    The strictest on the way up counts. In a container the path may be the host's; then its root is looked at.
    """
    limits = [math.inf]
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        own = Path(path.lstrip("/"))
        for group in (own, *own.parents):
            if not controllers:
                limits.append(_limit(root / group / "cpu.max"))
            elif "cpu" in controllers.split(","):
                limits += [_limit(root / name / group / "cpu.cfs_quota_us") for name in ("cpu", controllers)]
    return min(limits)


def _limit(file: Path) -> float:
    """`quota period` of version 2 of control groups, or the quota alone with the period in a file beside it."""
    try:
        words = file.read_text(encoding="utf-8").split()
        if len(words) == 1:
            words += file.with_name("cpu.cfs_period_us").read_text(encoding="utf-8").split()
        quota, period = float(words[0]), float(words[1])
    except (OSError, ValueError, IndexError):  # no such group, or `max`
        return math.inf
    return quota / period if quota > 0 and period > 0 else math.inf
