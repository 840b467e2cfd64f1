"""What the ranks compute on, and how fast it multiplies matrices."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from harness.doctor.finding import Finding, Probe, Site, ranks_text
from harness.doctor.software import driver_version

__all__ = ["GPUS", "MATRIX_RATE"]

_GIB = 2**30
_OTHERS_BYTES = 3 * _GIB // 2
"""More in use, before anything has started, than contexts of this rank and the driver's own need."""
_SLOW_FRAC = 0.75
"""Of the fastest rank: below it the others wait for this one."""
_MEASURE_S = 0.3
_SIZES = {"cuda": (8192, torch.bfloat16), "cpu": (1024, torch.float32)}


class _Gpu(NamedTuple):
    name: str | None
    """None: torch sees none."""
    used_bytes: int
    has_driver: bool


def _measure_gpu(site: Site) -> _Gpu:
    has_driver = driver_version() is not None
    if site.world.device.type != "cuda":
        return _Gpu(None, 0, has_driver and not torch.cuda.is_available())
    free, total = torch.cuda.mem_get_info(site.world.device)
    return _Gpu(torch.cuda.get_device_name(site.world.device), total - free, has_driver)


def _judge_gpus(measured: Sequence[_Gpu]) -> list[Finding]:
    names = [gpu.name for gpu in measured]
    if not any(names):
        if any(gpu.has_driver for gpu in measured):
            return [
                Finding(
                    "GPUs",
                    "there is a driver, and torch sees no GPU",
                    "fail",
                    "`python -c 'import torch; torch.cuda.init()'` says why; see CUDA_VISIBLE_DEVICES",
                )
            ]
        return [Finding("GPUs", "none: a run computes on the CPU")]
    return [_models(names), _memory(measured)]


def _models(names: Sequence[str | None]) -> Finding:
    if len(set(names)) == 1:
        return Finding("GPUs", f"{names[0]}, one for each rank", by_rank=names)
    value = ranks_text({rank: name or "none" for rank, name in enumerate(names)})
    remedy = "a step takes as long as the slowest GPU: ask the scheduler for one kind"
    return Finding("GPUs", value, "warn", remedy, names)


def _memory(measured: Sequence[_Gpu]) -> Finding:
    used = [round(gpu.used_bytes / _GIB, 1) for gpu in measured]
    full = {rank: f"{used[rank]} GiB" for rank, gpu in enumerate(measured) if gpu.used_bytes > _OTHERS_BYTES}
    if not full:
        return Finding("GPU memory in use", f"{max(used)} GiB at most", by_rank=used)
    remedy = "another process is on the GPU: nvidia-smi shows which"
    return Finding("GPU memory in use", ranks_text(full), "warn", remedy, used)


class _Rate(NamedTuple):
    tflops: float
    """10^12 floating-point operations a second."""
    kind: str
    host: str


def _measure_rate(site: Site) -> _Rate:
    device = site.world.device
    size, dtype = _SIZES[device.type]
    factors = torch.ones(2, size, size, dtype=dtype, device=device)
    products, seconds = 0, 0.0
    _multiply(factors)  # libraries are loaded and chosen
    while seconds < _MEASURE_S:
        began = time.perf_counter()
        _multiply(factors)
        seconds += time.perf_counter() - began
        products += 1
    kind = f"{str(dtype).removeprefix('torch.')}, {size} x {size}"
    return _Rate(2 * size**3 * products / seconds / 1e12, kind, socket.gethostname())


def _multiply(factors: torch.Tensor) -> None:
    torch.mm(factors[0], factors[1])
    if factors.device.type == "cuda":
        torch.cuda.synchronize(factors.device)


def _judge_rates(measured: Sequence[_Rate]) -> list[Finding]:
    rates = [round(each.tflops, 3) for each in measured]
    best = max(rates)
    value = f"{min(rates):.3g} TFLOP/s at least, {best:.3g} at most ({measured[0].kind})"
    slow = {
        rank: f"{rates[rank]:.4g} on {each.host}"
        for rank, each in enumerate(measured)
        if rates[rank] < _SLOW_FRAC * best
    }
    if not slow:
        return [Finding("matrix rate", value, by_rank=rates)]
    slow_text = "; ".join(f"rank {rank}: {text}" for rank, text in slow.items())
    remedy = "all ranks wait for the slowest: look at clocks, heat and other processes (nvidia-smi -q, top)"
    return [Finding("matrix rate", f"{value}; slow: {slow_text}", "warn", remedy, rates)]


GPUS = Probe("GPUs", _measure_gpu, _judge_gpus)
MATRIX_RATE = Probe("matrix rate", _measure_rate, _judge_rates)
