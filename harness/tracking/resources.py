"""What a node is doing: processor, memory, disk, network, and its NVIDIA GPUs through NVML.

Sampled in the side process. GPUs are read through the driver, not through torch, and whatever a GPU does
not report is left out.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from harness.runlog.names import Prefix
from harness.runlog.nodes import NodeLog

__all__ = ["Sampler", "describe_gpu", "sample_forever"]

logger = logging.getLogger(__name__)

GB = 1e9
# Bits of NVML's clocks-event reasons that mean that the GPU is held back, by what it is held back.
THROTTLE_BITS = {"power": 0x4 | 0x80, "thermal": 0x20 | 0x40, "hardware": 0x8}


class Sampler:
    """Reads the node's state; rates are taken since the last call.

    Args:
        disk: A path on the disk whose free space counts.
        pid: Process whose own use is reported too, such as the trainer.
    """

    def __init__(self, disk: str | Path, *, pid: int | None = None) -> None:
        self._disk = str(disk)
        self._process = _process(pid)
        self._network = psutil.net_io_counters()
        self._time = time.monotonic()
        self._gpus = _gpu_handles()
        psutil.cpu_percent()
        self.sample_process()

    def sample(self) -> dict[str, float]:
        """Values by name: `cpu_frac`, `ram_used_gb`, `gpu0/util_frac` and so on."""
        values = {"cpu_frac": psutil.cpu_percent() / 100, **self._memory(), **self._network_rates()}
        values |= self.sample_process()
        for index, handle in enumerate(self._gpus):
            values |= {f"gpu{index}/{name}": value for name, value in sample_gpu(handle).items()}
        return values

    def sample_process(self) -> dict[str, float]:
        """The watched process's memory and processor use, if it lives."""
        if self._process is None:
            return {}
        with contextlib.suppress(psutil.Error), self._process.oneshot():
            return {
                "process_ram_gb": self._process.memory_info().rss / GB,
                "process_cpu_cores": self._process.cpu_percent() / 100,
                "process_threads": float(self._process.num_threads()),
            }
        return {}

    def _memory(self) -> dict[str, float]:
        ram = psutil.virtual_memory()
        values = {"ram_used_gb": (ram.total - ram.available) / GB, "ram_used_frac": ram.percent / 100}
        with contextlib.suppress(OSError):
            disk = psutil.disk_usage(self._disk)
            values |= {"disk_free_gb": disk.free / GB, "disk_used_frac": disk.percent / 100}
        return values

    def _network_rates(self) -> dict[str, float]:
        now, network = time.monotonic(), psutil.net_io_counters()
        past_s = max(now - self._time, 1e-9)
        sent = (network.bytes_sent - self._network.bytes_sent) / past_s / 1e6
        received = (network.bytes_recv - self._network.bytes_recv) / past_s / 1e6
        self._time, self._network = now, network
        return {"network_sent_mb_per_s": sent, "network_received_mb_per_s": received}


def sample_forever(
    sampler: Sampler, node_log: NodeLog, *, node: str, every_s: float, ended: threading.Event
) -> None:
    """Writes a `system` record every `every_s` seconds until `ended` is set."""
    prefix = f"{Prefix.SYSTEM}{node}/" if node else Prefix.SYSTEM
    while not ended.wait(every_s):
        node_log.write("system", {prefix + name: value for name, value in sampler.sample().items()})


def sample_gpu(handle: Any) -> dict[str, float]:
    """One GPU by its NVML handle. What this GPU or driver does not know is left out."""
    values: dict[str, float] = {}
    for read in _gpu_readings():
        with contextlib.suppress(_nvml().NVMLError):
            values |= read(handle)
    return values


def describe_gpu(uuid: str) -> str:
    """Clocks, temperature, power and what holds a GPU back, in words; as far as the driver tells.

    Args:
        uuid: As torch has it, with or without the `GPU-` in front.
    """
    try:
        nvml = _nvml()
        nvml.nvmlInit()
        values = sample_gpu(nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}"))
    except ImportError:
        return "its clocks are not known: `pip install nvidia-ml-py`"
    except _nvml().NVMLError as error:
        return f"its clocks are not known: {error}"
    return _gpu_words(values)


def _gpu_words(values: Mapping[str, float]) -> str:
    shown = {
        "sm_clock_mhz": "SM clock {:.0f} MHz",
        "memory_clock_mhz": "memory clock {:.0f} MHz",
        "temperature_c": "{:.0f} °C",
        "power_w": "{:.0f} W",
    }
    words = [text.format(values[name]) for name, text in shown.items() if name in values]
    known = [name for name in THROTTLE_BITS if f"throttled_{name}" in values]
    held_back = [name for name in known if values[f"throttled_{name}"]]
    if known:
        words.append(f"throttled: {', '.join(held_back) or 'no'}")
    return ", ".join(words)


def _gpu_readings() -> list[Callable[[Any], dict[str, float]]]:
    nvml = _nvml()

    def use(gpu: Any) -> dict[str, float]:
        return {"util_frac": nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100}

    def memory(gpu: Any) -> dict[str, float]:
        info = nvml.nvmlDeviceGetMemoryInfo(gpu)
        return {"memory_used_gb": info.used / GB, "memory_used_frac": info.used / info.total}

    def temperature(gpu: Any) -> dict[str, float]:
        return {"temperature_c": float(nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU))}

    def power(gpu: Any) -> dict[str, float]:
        return {"power_w": nvml.nvmlDeviceGetPowerUsage(gpu) / 1000}

    def clocks(gpu: Any) -> dict[str, float]:
        return {
            "sm_clock_mhz": float(nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM)),
            "memory_clock_mhz": float(nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM)),
        }

    def throttling(gpu: Any) -> dict[str, float]:
        reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu)
        return {f"throttled_{name}": float(bool(reasons & bits)) for name, bits in THROTTLE_BITS.items()}

    def ecc(gpu: Any) -> dict[str, float]:
        kinds = {
            "ecc_corrected": nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED,
            "ecc_uncorrected": nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
        }
        counter = nvml.NVML_AGGREGATE_ECC
        return {
            name: float(nvml.nvmlDeviceGetTotalEccErrors(gpu, kind, counter)) for name, kind in kinds.items()
        }

    return [use, memory, temperature, power, clocks, throttling, ecc]


@functools.cache
def _nvml() -> Any:
    import pynvml

    return pynvml


def _gpu_handles() -> list[Any]:
    try:
        nvml = _nvml()
        nvml.nvmlInit()
        return [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    except ImportError:
        logger.info("GPUs are not watched: `pip install nvidia-ml-py`")
    except _nvml().NVMLError:  # no NVIDIA driver: no GPUs to watch
        pass
    return []


def _process(pid: int | None) -> psutil.Process | None:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid)
    return None
