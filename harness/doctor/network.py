"""Between the ranks: where they met, their names and clocks, and how fast gradients travel."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from harness import env
from harness.dist import all_reduce_sum, barrier
from harness.doctor.finding import Finding, Probe, Site, Verdict, ranks_text

__all__ = ["ALL_REDUCE", "CLOCKS", "HOSTS", "PORTS", "RENDEZVOUS_PORT"]

RENDEZVOUS_PORT = 29500
"""In the launch files."""
_BYTES = {"cuda": 256 << 20, "cpu": 16 << 20}
_REPEATS = 5
_SLOW_GB_PER_S = 10.0
"""Between GPUs: what is slower goes over a network that is not meant for it."""
_SKEW_S = 1.0
"""Above it, log lines and events of different machines no longer stand in their order."""
_WRONG_CLOCK_S = 60.0
"""Above it, certificates and tokens of trackers and file systems may be refused."""


class _AllReduce(NamedTuple):
    seconds: float
    """0: there is one rank only."""
    num_bytes: int
    is_right: bool
    on: str


def _make_values(site: Site) -> torch.Tensor:
    device = site.world.device
    values = torch.ones(_BYTES[device.type] // 4, device=device)
    bool((values == 1).all())  # memory for the comparison may be missing too
    return values


def _measure_all_reduce(site: Site, values: torch.Tensor) -> _AllReduce:
    world, num_bytes = site.world, values.nbytes
    if world.world_size == 1:
        return _AllReduce(0.0, num_bytes, True, world.device.type)
    all_reduce_sum(values)  # connections are made
    is_right = bool((values == world.world_size).all())
    barrier()
    began = time.perf_counter()
    for _ in range(_REPEATS):
        all_reduce_sum(values.fill_(1.0))
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    seconds = (time.perf_counter() - began) / _REPEATS
    is_right = is_right and bool((values == world.world_size).all())
    return _AllReduce(seconds, num_bytes, is_right, world.device.type)


def _judge_all_reduce(measured: Sequence[_AllReduce]) -> list[Finding]:
    size = len(measured)
    if size == 1:
        return [Finding("all-reduce", "one process: nothing to reduce")]
    # What each rank sends and receives in a ring, as nccl-tests count it.
    rates = [round(2 * (size - 1) / size * each.num_bytes / each.seconds / 1e9, 3) for each in measured]
    value = f"{min(rates):.4g} GB/s (bus bandwidth, {measured[0].num_bytes >> 20} MiB, {measured[0].on})"
    if wrong := [rank for rank, each in enumerate(measured) if not each.is_right]:
        remedy = "do not train on it: with NCCL_P2P_DISABLE=1 it goes without the links between GPUs"
        return [Finding("all-reduce", f"wrong sums on ranks {wrong}", "fail", remedy, rates)]
    if measured[0].on == "cuda" and min(rates) < _SLOW_GB_PER_S:
        remedy = (
            "NCCL_DEBUG=INFO says over which network it goes; `nvidia-smi topo -m` how GPUs are connected"
        )
        return [Finding("all-reduce", value, "warn", remedy, rates)]
    return [Finding("all-reduce", value, by_rank=rates)]


def _measure_clock(site: Site, alone: None) -> float:
    barrier()
    return time.time()


def _judge_clocks(measured: Sequence[float]) -> list[Finding]:
    if len(measured) == 1:
        return [Finding("clock skew", "one process: no other clock")]
    skews = [round(clock - measured[0], 3) for clock in measured]
    skew_s = max(skews) - min(skews)
    value = f"{skew_s:.3f} s between {len(skews)} ranks, the wait for each other included"
    verdict: Verdict = "ok" if skew_s < _SKEW_S else "warn" if skew_s < _WRONG_CLOCK_S else "fail"
    remedy = "" if verdict == "ok" else "set the clocks by chrony or ntpd on all machines"
    return [Finding("clock skew", value, verdict, remedy, skews)]


class _Host(NamedTuple):
    name: str
    is_reachable: bool
    """Whether its own name leads to an address that other machines can use."""


def _measure_host(site: Site) -> _Host:
    name = socket.gethostname()
    with contextlib.suppress(OSError, ValueError):
        address = ipaddress.ip_address(socket.gethostbyname(name))
        return _Host(name, not address.is_loopback)
    return _Host(name, False)


def _judge_hosts(measured: Sequence[_Host]) -> list[Finding]:
    names = [host.name for host in measured]
    value = ranks_text(dict(enumerate(names)))
    hidden = sorted({host.name for host in measured if not host.is_reachable})
    if len(set(names)) == 1 or not hidden:
        return [Finding("hosts", value, by_rank=names)]
    remedy = "give torchrun --local-addr, and set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to their network"
    value = f"{value}; {', '.join(hidden)}: the own name leads to no address that others reach"
    return [Finding("hosts", value, "warn", remedy, names)]


class _Port(NamedTuple):
    met_at: str | None
    is_free: bool


def _measure_port(site: Site) -> _Port:
    met_at = env.rendezvous_address()
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", RENDEZVOUS_PORT))
        except OSError:
            return _Port(met_at, False)
    return _Port(met_at, True)


def _judge_ports(measured: Sequence[_Port]) -> list[Finding]:
    if measured[0].met_at is not None:
        return [Finding("ports", f"{len(measured)} ranks met at {measured[0].met_at}")]
    if measured[0].is_free:
        return [Finding("ports", f"{RENDEZVOUS_PORT}, at which the launch files meet, is free")]
    remedy = "another run or program has it: set PORT for Slurm, MASTER_PORT or --rdzv-endpoint for torchrun"
    return [Finding("ports", f"{RENDEZVOUS_PORT}, at which the launch files meet, is in use", "warn", remedy)]


ALL_REDUCE = Probe("all-reduce", _make_values, _judge_all_reduce, _measure_all_reduce)
CLOCKS = Probe("clock skew", lambda site: None, _judge_clocks, _measure_clock)
HOSTS = Probe("hosts", _measure_host, _judge_hosts)
PORTS = Probe("ports", _measure_port, _judge_ports)
