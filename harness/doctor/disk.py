"""The disk on which runs are kept: room, speed, and whether all machines see the same one."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from harness.dist import barrier, from_main
from harness.doctor.finding import Finding, Probe, Site
from harness.files import nearest_folder

__all__ = ["DISK", "SHARED_DISK", "SHARED_MEMORY"]

_GB = 1e9
_WRITTEN_BYTES = 64 << 20
_LITTLE_BYTES, _FULL_BYTES = 20 * _GB, 1 * _GB
_SLOW_MB_PER_S = 100.0
_SHM = Path("/dev/shm")
_LITTLE_SHM_BYTES = 1 * _GB


class _Disk(NamedTuple):
    folder: str
    host: str
    free_bytes: int
    write_mb_per_s: float
    """Until the data is on the disk, as one process writes."""


def _measure_disk(site: Site) -> _Disk | None:
    """On the first process of each machine; None on the others."""
    if site.world.local_rank:
        return None
    folder = nearest_folder(site.runs_dir)  # an examination leaves nothing behind
    portion = os.urandom(1 << 20)  # which no file system compresses
    began = time.perf_counter()
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(_WRITTEN_BYTES >> 20):
            file.write(portion)
        file.flush()
        os.fsync(file.fileno())
        seconds = time.perf_counter() - began
    free = shutil.disk_usage(folder).free
    return _Disk(str(folder), socket.gethostname(), free, _WRITTEN_BYTES / 1e6 / seconds)


def _judge_disks(measured: Sequence[_Disk | None]) -> list[Finding]:
    disks = [disk for disk in measured if disk is not None]
    return [_space(min(disks, key=lambda disk: disk.free_bytes)), _speed(disks)]


def _space(disk: _Disk) -> Finding:
    value = f"{disk.free_bytes / _GB:.1f} GB free in {disk.folder} on {disk.host}"
    remedy = (
        "a checkpoint takes 12 bytes a parameter and more, and several are kept: make room, or set --runs_dir"
    )
    if disk.free_bytes < _LITTLE_BYTES:
        return Finding("disk space", value, "fail" if disk.free_bytes < _FULL_BYTES else "warn", remedy)
    return Finding("disk space", value)


def _speed(disks: Sequence[_Disk]) -> Finding:
    slowest = min(disks, key=lambda disk: disk.write_mb_per_s)
    value = f"{slowest.write_mb_per_s:.0f} MB/s written to {slowest.folder} on {slowest.host}"
    rates = [round(disk.write_mb_per_s) for disk in disks]
    if slowest.write_mb_per_s >= _SLOW_MB_PER_S:
        return Finding("disk speed", value, by_rank=rates)
    remedy = (
        "checkpoints are written beside the training, but a stop waits for the last one: use a faster disk"
    )
    return Finding("disk speed", value, "warn", remedy, rates)


class _Sight(NamedTuple):
    host: str
    sees: bool


def _find_folder(site: Site) -> Path:
    return nearest_folder(site.runs_dir)


def _measure_sight(site: Site, folder: Path) -> _Sight:
    mark = from_main(lambda: _leave_mark(folder))
    sees = False
    with contextlib.suppress(OSError):  # a rank that left here would leave the others waiting
        sees = mark is not None and Path(mark).exists()
    barrier()
    if mark is not None and site.world.is_main:
        os.unlink(mark)
    return _Sight(socket.gethostname(), sees)


def _leave_mark(folder: Path) -> str | None:
    """A file's path; None where it cannot be written, of which the probe of the disk speaks."""
    try:
        descriptor, path = tempfile.mkstemp(prefix=".harness-doctor-", dir=folder)
    except OSError:
        return None
    os.close(descriptor)
    return path


def _judge_sights(measured: Sequence[_Sight]) -> list[Finding]:
    blind = sorted({each.host for each in measured if not each.sees})
    hosts = len({each.host for each in measured})
    if hosts == 1:
        return []
    if not blind:
        return [Finding("shared disk", f"all {hosts} machines see the folder of runs")]
    remedy = "all ranks write their part of a checkpoint into one folder: put --runs on a shared file system"
    return [Finding("shared disk", f"{', '.join(blind)} sees not what rank 0 writes", "fail", remedy)]


def _measure_shm(site: Site) -> int | None:
    return shutil.disk_usage(_SHM).total if _SHM.is_dir() else None


def _judge_shm(measured: Sequence[int | None]) -> list[Finding]:
    sizes = [size for size in measured if size is not None]
    if not sizes:
        return []
    value = f"{min(sizes) / _GB:.1f} GB of {_SHM}"
    if min(sizes) >= _LITTLE_SHM_BYTES:
        return [Finding("shared memory", value)]
    remedy = "loader workers and NCCL need it: docker run --shm-size=8g; in Kubernetes an emptyDir in memory"
    return [Finding("shared memory", value, "warn", remedy)]


DISK = Probe("disk", _measure_disk, _judge_disks)
SHARED_DISK = Probe("shared disk", _find_folder, _judge_sights, _measure_sight)
SHARED_MEMORY = Probe("shared memory", _measure_shm, _judge_shm)
