"""Model FLOPs utilisation: how much of what the devices could compute the training uses."""

from __future__ import annotations

import torch

__all__ = ["peak_flops"]

# Dense bf16 operations per second, from NVIDIA's data sheets; the longest name that fits counts.
_PEAKS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L4": 121e12,
    "L40S": 362e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Peak operations per second of `device` in bf16; None where it is not known, as on CPUs."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = [key for key in _PEAKS if key in name]
    return _PEAKS[max(known, key=len)] if known else None
