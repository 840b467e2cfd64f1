"""`harness doctor` on one process, and its judgement of what many ranks might have measured."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from harness.cli.doctor import run
from harness.doctor.devices import GPUS, MATRIX_RATE
from harness.doctor.disk import DISK, SHARED_DISK, SHARED_MEMORY
from harness.doctor.finding import Finding, Probe, worst
from harness.doctor.login import WANDB
from harness.doctor.network import ALL_REDUCE, CLOCKS, HOSTS, PORTS
from harness.doctor.software import SOFTWARE

GIB = 2**30


def test_one_process_is_examined_and_says_so_to_people_and_machines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["--runs", str(tmp_path / "runs"), "--device=cpu", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["ranks"] == 1
    found = {each["what"]: each for each in said["findings"]}
    assert {"torch", "GPUs", "matrix rate", "disk space", "disk speed", "ports", "W&B login"} <= set(found)
    assert found["matrix rate"]["by_rank"][0] > 0
    assert all(each["verdict"] == "ok" or each["remedy"] for each in said["findings"])
    assert list(tmp_path.iterdir()) == []  # an examination leaves nothing behind


def test_a_folder_that_cannot_be_written_fails_and_the_rest_is_examined(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["--runs=/proc/runs", "--device=cpu"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("fail  disk ") for line in lines) == 1
    assert any(line.startswith("ok    torch ") for line in lines)


def test_a_port_in_use_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        monkeypatch.setattr("harness.doctor.network.RENDEZVOUS_PORT", other.getsockname()[1])
        (finding,) = PORTS.judge([PORTS.measure(None)])  # type: ignore[arg-type]  # it needs no site
    assert finding.verdict == "warn"


VERSIONS = {"torch": "2.13.0", "NCCL": "2.27.3", "NVIDIA driver": "580.1"}
# What ranks measured, in the order of the fields, and the finding that is not ok.
UNFIT: dict[str, tuple[Probe, Sequence[Any], str, str]] = {
    "versions": (SOFTWARE, [VERSIONS, {**VERSIONS, "NCCL": "2.26.2"}], "fail", "2.26.2 on rank 1"),
    "kinds": (GPUS, [("H100", 0, True), ("A100", 0, True)], "warn", "A100 on rank 1"),
    "driver alone": (GPUS, [(None, 0, True)], "fail", "torch sees no GPU"),
    "busy GPU": (GPUS, [("H100", 0, True), ("H100", 9 * GIB, True)], "warn", "9.0 GiB on rank 1"),
    "slow rank": (MATRIX_RATE, [(600.0, "bf16", "a"), (400.0, "bf16", "b")], "warn", "rank 1: 400 on b"),
    "wrong sums": (ALL_REDUCE, [(0.1, GIB, True, "cuda"), (0.1, GIB, False, "cuda")], "fail", "ranks [1]"),
    "slow links": (ALL_REDUCE, [(1.0, GIB, True, "cuda")] * 2, "warn", "1.074 GB/s"),
    "late clock": (CLOCKS, [1000.0, 1003.0], "warn", "3.000 s"),
    "wrong clock": (CLOCKS, [1000.0, 4600.0], "fail", "3600.000 s"),
    "hidden host": (HOSTS, [("a", True), ("b", False)], "warn", "b: the own name"),
    "little space": (DISK, [("/runs", "a", 5 * 10**9, 500.0), None], "warn", "5.0 GB free"),
    "no space": (DISK, [("/runs", "a", 10**8, 500.0)], "fail", "0.1 GB free"),
    "slow disk": (DISK, [("/runs", "a", 10**12, 500.0), ("/runs", "b", 10**12, 20.0)], "warn", "20 MB/s"),
    "own disks": (SHARED_DISK, [("a", True), ("b", False)], "fail", "b sees not"),
    "little shm": (SHARED_MEMORY, [64 << 20, 64 << 20], "warn", "0.1 GB"),
    "no key": (WANDB, [("api.wandb.ai", False, False)], "warn", "no key"),
    "no connection": (WANDB, [("api.wandb.ai", True, False)], "warn", "does not answer"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_would_harm_a_training_is_found_with_the_rank_and_a_remedy(name: str) -> None:
    probe, measured, verdict, said = UNFIT[name]
    findings = judge(probe, measured)
    bad = [finding for finding in findings if finding.verdict != "ok"]
    assert [finding.verdict for finding in bad] == [verdict] == [worst(findings)]
    assert said in bad[0].value
    assert bad[0].remedy


def test_what_is_the_same_everywhere_is_well() -> None:
    assert worst(SOFTWARE.judge([VERSIONS, VERSIONS])) == "ok"
    assert worst(judge(GPUS, [("H100", GIB, True)] * 8)) == "ok"
    assert worst(judge(ALL_REDUCE, [(0.01, GIB, True, "cuda")] * 8)) == "ok"
    assert worst(judge(HOSTS, [("a", False)] * 8)) == "ok"  # of one machine alone


def judge(probe: Probe, measured: Sequence[Any]) -> list[Finding]:
    """With the tuples of a test made into what the probe's ranks send."""
    home = __import__(probe.judge.__module__, fromlist=["*"])
    kinds = {"GPUs": "_Gpu", "matrix rate": "_Rate", "all-reduce": "_AllReduce", "hosts": "_Host"}
    kinds |= {"disk": "_Disk", "shared disk": "_Sight", "W&B login": "_Login"}
    kind = getattr(home, kinds[probe.what]) if probe.what in kinds else None
    return probe.judge([kind(*each) if kind and each is not None else each for each in measured])
