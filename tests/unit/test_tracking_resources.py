"""The node's samples: sane on this machine, and complete for a GPU as NVML describes it."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.runlog.nodes import NodeLog
from harness.runlog.reader import open_run
from harness.runlog.writer import RunLog
from harness.tracking import resources
from harness.tracking.resources import Sampler, sample_forever, sample_gpu
from tests.support.runs import wait_for


class FakeNvml:
    """Answers as pynvml does for a GPU that is throttled by heat and has no ECC."""

    class NVMLError(Exception):
        pass

    NVML_TEMPERATURE_GPU = NVML_CLOCK_SM = 0
    NVML_CLOCK_MEM = 2
    NVML_MEMORY_ERROR_TYPE_CORRECTED, NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 0, 1
    NVML_AGGREGATE_ECC = 1

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return f"gpu {index}"

    def nvmlDeviceGetUtilizationRates(self, _: str) -> Any:
        return SimpleNamespace(gpu=75, memory=10)

    def nvmlDeviceGetMemoryInfo(self, _: str) -> Any:
        return SimpleNamespace(used=2e10, total=8e10)

    def nvmlDeviceGetTemperature(self, _: str, sensor: int) -> int:
        return 61

    def nvmlDeviceGetPowerUsage(self, _: str) -> int:
        return 350_000

    def nvmlDeviceGetClockInfo(self, _: str, kind: int) -> int:
        return 1980 if kind == self.NVML_CLOCK_SM else 2619

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, _: str) -> int:
        return 0x20

    def nvmlDeviceGetTotalEccErrors(self, _: str, kind: int, counter: int) -> int:
        raise self.NVMLError("not supported")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNvml()
    monkeypatch.setattr(resources, "_nvml", lambda: fake)


@pytest.mark.usefixtures("gpu")
def test_a_gpu_is_described_by_what_it_reports_and_what_it_does_not_is_left_out() -> None:
    assert sample_gpu("gpu 0") == {
        "util_frac": 0.75,
        "memory_used_gb": 20.0,
        "memory_used_frac": 0.25,
        "temperature_c": 61.0,
        "power_w": 350.0,
        "sm_clock_mhz": 1980.0,
        "memory_clock_mhz": 2619.0,
        "throttled_power": 0.0,
        "throttled_thermal": 1.0,
        "throttled_hardware": 0.0,
    }


@pytest.mark.usefixtures("gpu")
def test_each_gpus_values_carry_its_number(tmp_path: Path) -> None:
    assert Sampler(tmp_path).sample()["gpu0/power_w"] == 350.0


def test_this_machine_has_memory_disk_and_a_busy_process(tmp_path: Path) -> None:
    began = time.monotonic()
    sampler = Sampler(tmp_path, pid=os.getpid())
    until = time.process_time() + 0.1
    while time.process_time() < until:
        pass
    sample = sampler.sample()
    elapsed_s = time.monotonic() - began
    assert 0 < sample["ram_used_frac"] < 1
    assert 0 < sample["process_ram_gb"] < sample["ram_used_gb"] + 1
    assert sample["disk_free_gb"] > 0
    assert sample["process_cpu_cores"] > 0.05 / elapsed_s  # the system counts in hundredths of a second
    assert 0 <= sample["cpu_frac"] <= 1


def test_a_process_that_is_gone_is_left_out(tmp_path: Path) -> None:
    assert "process_ram_gb" not in Sampler(tmp_path, pid=2**22 + 1).sample()


def test_samples_of_several_nodes_are_told_apart(tmp_path: Path) -> None:
    both = {"system/ram_used_gb", "system/node-1/ram_used_gb"}
    with RunLog(tmp_path) as log:
        log.write("step", {"train/loss": 1.0}, step=3)
        ended = threading.Event()
        threads = [
            threading.Thread(
                target=sample_forever,
                args=(Sampler(tmp_path), NodeLog(tmp_path)),
                kwargs={"node": node, "every_s": 0.02, "ended": ended},
            )
            for node in ("", "node-1")
        ]
        for thread in threads:
            thread.start()
        wait_for(lambda: both <= set(open_run(tmp_path).names()), what="a sample of each node")
        ended.set()
        for thread in threads:
            thread.join()
    run = open_run(tmp_path)
    assert both <= set(run.names())
    assert set(run.scalars("system/node-1/ram_used_gb").steps.tolist()) == {3}
