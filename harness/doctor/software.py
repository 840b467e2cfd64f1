"""Versions of what the ranks run, which have to be the same on all of them."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from harness import __version__
from harness.doctor.finding import Finding, Probe, Site, ranks_text

__all__ = ["SOFTWARE", "driver_version"]

_DRIVER = Path("/proc/driver/nvidia/version")


def driver_version() -> str | None:
    """The version of NVIDIA's kernel module, as Linux tells it; None where there is none."""
    try:
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", _DRIVER.read_text())
    except OSError:
        return None
    return found[0] if found else None


def _measure(site: Site) -> dict[str, str | None]:
    on_cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "harness": __version__,
        "torch": torch.__version__,
        "NVIDIA driver": driver_version(),
        "CUDA of torch": torch.version.cuda,
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if on_cuda else None,
    }


def _judge(measured: Sequence[dict[str, str | None]]) -> list[Finding]:
    return [
        _version(what, [versions[what] for versions in measured])
        for what in measured[0]
        if any(versions[what] for versions in measured)
    ]


def _version(what: str, versions: Sequence[str | None]) -> Finding:
    if len(set(versions)) == 1:
        return Finding(what, str(versions[0]), by_rank=versions)
    return Finding(
        what,
        ranks_text({rank: version or "none" for rank, version in enumerate(versions)}),
        "fail",
        f"install the same {what} everywhere: results, and NCCL's protocol, depend on it",
        versions,
    )


SOFTWARE = Probe("versions", _measure, _judge)
