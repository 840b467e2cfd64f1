"""All probes of the machines, on all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from harness.dist import gather
from harness.doctor.devices import GPUS, MATRIX_RATE
from harness.doctor.disk import DISK, SHARED_DISK, SHARED_MEMORY
from harness.doctor.finding import Finding, Probe, Site
from harness.doctor.login import WANDB
from harness.doctor.network import ALL_REDUCE, CLOCKS, HOSTS, PORTS
from harness.doctor.software import SOFTWARE

__all__ = ["PROBES", "examine"]

PROBES = (
    SOFTWARE, HOSTS, PORTS, CLOCKS, GPUS, MATRIX_RATE, ALL_REDUCE, DISK, SHARED_DISK, SHARED_MEMORY, WANDB,
)  # fmt: skip


class _Unmeasured(NamedTuple):
    reason: str


def examine(site: Site, probes: Sequence[Probe] = PROBES) -> list[Finding]:
    """What all probes find; on every rank, with the same result on each. Takes some seconds."""
    return [finding for probe in probes for finding in _apply(probe, site)]


def _apply(probe: Probe, site: Site) -> list[Finding]:
    own = _attempt(lambda: probe.measure(site))
    if probe.measure_collectively is not None:
        # A rank that has failed would leave the others waiting in a collective.
        failed = _failed(probe, gather(lambda: own if isinstance(own, _Unmeasured) else None))
        if failed:
            return failed
        collectively, alone = probe.measure_collectively, own
        own = _attempt(lambda: collectively(site, alone))
    measured = gather(lambda: own)
    return _failed(probe, measured) or probe.judge(measured)


def _failed(probe: Probe, measured: Sequence[Any]) -> list[Finding]:
    """A finding with the ranks that could not measure; none where all could."""
    failed = {rank: each.reason for rank, each in enumerate(measured) if isinstance(each, _Unmeasured)}
    if not failed:
        return []
    reasons = "; ".join(f"rank {rank}: {reason}" for rank, reason in failed.items())
    return [Finding(probe.what, reasons, "fail", "this is what a training would meet there")]


def _attempt(measure: Callable[[], Any]) -> Any:
    try:
        return measure()
    except (OSError, RuntimeError) as error:
        return _Unmeasured((str(error) or type(error).__name__).splitlines()[0])
