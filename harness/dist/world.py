"""The processes of a run: how many, which one this is, and the device that it computes on."""

from __future__ import annotations

import datetime
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from harness import env
from harness.config import ParallelConfig
from harness.dist.connections import Connections
from harness.dist.rendezvous import await_store, fresh_store
from harness.errors import HarnessError, LaunchError, LostRankError
from harness.network import interface_towards

__all__ = ["World", "open_world"]


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This process among all of the run. A single process is rank 0 of 1."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only one that writes logs and speaks to trackers."""
        return self.rank == 0


@contextmanager
def open_world(parallel: ParallelConfig, *, stopping: Callable[[], bool] = lambda: False) -> Iterator[World]:
    """Joins the processes that the launcher started; leaves them at the end, without waiting for any.

    Works under `python`, `torchrun`, `accelerate launch` and anything else that sets RANK and WORLD_SIZE.
    Tensors on CUDA go over NCCL and those on CPU over gloo.

    Args:
        stopping: Whether this process was asked to stop; the others may not come then.

    Raises:
        LaunchError: more processes than GPUs, no CUDA where it was asked for, a rendezvous that failed, or
            several processes of which none knows about the others.
        LostRankError: something failed within it after another machine was silent for `parallel.silent_s`.
    """
    launched = _launched()
    device = _device(parallel, launched)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    grouped = launched.by_launcher or parallel.strategy == "fsdp"
    connections = Connections(parallel.silent_s)
    try:
        with connections if launched.on_several_machines else nullcontext():
            if grouped:
                _join(launched, device, parallel, stopping)
            yield World(
                rank=launched.rank,
                local_rank=launched.local_rank,
                world_size=launched.world_size,
                device=device,
            )
    except Exception as error:
        if isinstance(error, HarnessError) or not connections.lost:
            raise
        raise LostRankError(
            f"rank {launched.rank} lost {', '.join(sorted(connections.lost))}: {str(error).splitlines()[0]}",
            rule=f"a machine that is silent for {parallel.silent_s:g} s (parallel.silent_s) is given up",
            remedy="look at it and at the network; a launcher that restarts may go on without it",
        ) from error
    finally:
        if dist.is_initialized():
            # A model whose gradients were reduced by gloo and that outlives the group aborts the process now
            # and then. So the caller keeps none, and what hangs together in circles is collected here.
            gc.collect()
            dist.destroy_process_group()


def _launched() -> env.Launched:
    launched, unheard = env.launched(), env.unheard_launcher()
    if unheard is not None and not launched.by_launcher:
        raise LaunchError(
            f"{unheard[0]} is {unheard[1]}, and RANK and WORLD_SIZE are not set",
            rule=f"{unheard[1]} processes would train {unheard[1]} times, each by itself",
            remedy="start one torchrun or `accelerate launch` per machine, as `harness launch --print slurm` does",
        )
    return launched


def _device(parallel: ParallelConfig, launched: env.Launched) -> torch.device:
    wanted = parallel.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() and not launched.on_cpu else "cpu"
    if wanted == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise LaunchError(
            "parallel.device is 'cuda' and torch sees no CUDA device",
            rule="a CUDA build of torch and a visible GPU are needed",
            remedy="set --parallel.device cpu, or look at nvidia-smi and CUDA_VISIBLE_DEVICES",
        )
    num_gpus = torch.cuda.device_count()
    if launched.local_world_size > num_gpus:
        raise LaunchError(
            f"{launched.local_world_size} processes on this machine and {num_gpus} GPUs",
            rule="every process needs a GPU of its own",
            remedy=f"start {num_gpus} processes, or set --parallel.device cpu",
        )
    return torch.device("cuda", launched.local_rank)


def _join(
    launched: env.Launched, device: torch.device, parallel: ParallelConfig, stopping: Callable[[], bool]
) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(seconds=parallel.timeout_s)
    if launched.on_several_machines:
        _choose_interface(launched.main_address)
    try:
        if launched.by_launcher:
            address = env.store_address()
            if address is not None:
                await_store(address, timeout_s=parallel.timeout_s, stopping=stopping)
            store, rank, world_size = next(rendezvous("env://", timeout=timeout))
            store.set_timeout(timeout)
            store = fresh_store(
                store, rank=rank, world_size=world_size, timeout_s=parallel.timeout_s, stopping=stopping
            )
        else:
            store, rank, world_size = dist.HashStore(), 0, 1  # type: ignore[attr-defined]  # there at run time
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise LostRankError(
            f"rank {launched.rank} of {launched.world_size} found no others: {str(error).splitlines()[0]}",
            rule="all processes have to reach each other and MASTER_ADDR:MASTER_PORT, which rank 0 opens",
            remedy="choose a free port (--main_process_port for accelerate, --master-port for torchrun), or set"
            " GLOO_SOCKET_IFNAME to the network interface that leads to the others",
        ) from error


def _choose_interface(main_address: str) -> None:
    """For gloo, which goes by the machine's own name: that may be 127.0.1.1, or nothing."""
    interface = interface_towards(main_address)
    if interface is not None:
        env.set_default("GLOO_SOCKET_IFNAME", interface)
