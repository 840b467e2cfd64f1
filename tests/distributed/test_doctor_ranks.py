"""`harness doctor` on two ranks: all of them find the same, and one that cannot measure is named."""

from __future__ import annotations

from pathlib import Path

import torch

from harness.dist import World
from harness.doctor import Finding, Site, examine
from harness.doctor.finding import Probe
from harness.doctor.machine import PROBES
from tests.support.distributed import run_ranks


def fail_on_rank_1(site: Site) -> int:
    if site.world.rank == 1:
        raise OSError("no such device")
    return 0


BROKEN = Probe("broken", fail_on_rank_1, lambda measured: [])


def examined(rank: int, world_size: int, folder: str) -> list[Finding]:
    world = World(rank=rank, local_rank=rank, world_size=world_size, device=torch.device("cpu"))
    return examine(Site(world, Path(folder)), (*PROBES, BROKEN))


def test_all_ranks_find_the_same_and_name_the_one_that_cannot_measure(tmp_path: Path) -> None:
    first, second = run_ranks(examined, 2, str(tmp_path))
    assert first == second
    found = {finding.what: finding for finding in first}
    for what in ("torch", "matrix rate", "all-reduce", "clock skew", "hosts"):
        assert len(found[what].by_rank) == 2, what
    assert min(found["all-reduce"].by_rank) > 0
    assert found["clock skew"].verdict == "ok"
    assert (found["broken"].verdict, found["broken"].value) == ("fail", "rank 1: no such device")
    assert list(tmp_path.iterdir()) == []
