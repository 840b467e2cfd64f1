"""Where torch's records of NCCL's collectives go; what they hold can only be seen with NCCL."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from harness.dist import keep_flight_records, write_flight_records

VARIABLE = "TORCH_FR_DUMP_TEMP_FILE"


@pytest.fixture(autouse=True)
def _without_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")  # so that it is as before afterwards
    monkeypatch.delenv(VARIABLE)


def test_torch_is_told_the_prefix_of_its_files_unless_the_user_has_said_it(tmp_path: Path) -> None:
    keep_flight_records(tmp_path / "incidents")
    assert Path(os.environ[VARIABLE]).parent.is_dir()
    keep_flight_records(tmp_path / "other")
    assert os.environ[VARIABLE] == str(tmp_path / "incidents" / "nccl-rank-")


def test_records_are_written_as_the_analyzer_of_torch_looks_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_flight_records(tmp_path, 3)
    if not torch.distributed.is_nccl_available():
        assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(torch._C._distributed_c10d, "_dump_nccl_trace", lambda: b"records", raising=False)
    write_flight_records(tmp_path, 3)
    assert (tmp_path / "nccl-rank-3").read_bytes() == b"records"
