"""A step's own computing time on CUDA: the device's, without what comes after, and nothing waits."""

from __future__ import annotations

import time

import pytest
import torch

from harness.training.timer import StepTimer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CYCLES = 200_000_000
"""Of the device's clock, of some GHz: about a tenth of a second."""


def test_the_time_is_the_devices_and_ends_with_the_local_gradients() -> None:
    timer = StepTimer(torch.device("cuda"))
    torch.cuda._sleep(1)
    torch.cuda.synchronize()
    start = time.perf_counter()
    timer.begin()
    torch.cuda._sleep(CYCLES)
    timer.local_done()
    torch.cuda._sleep(10 * CYCLES)
    hosts_s = timer.end()
    assert time.perf_counter() - start < 0.05  # nothing waited for the device
    assert hosts_s < 0.05
    torch.cuda.synchronize()
    timer.begin()
    devices_s = timer.end()
    assert 0.02 < devices_s < 0.5
